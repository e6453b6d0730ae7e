"""Settings for all tests: no time limit on an example, since machines are shared."""

from hypothesis import settings

settings.register_profile("shared", deadline=None)
settings.load_profile("shared")
