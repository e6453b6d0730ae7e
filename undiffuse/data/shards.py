from __future__ import annotations


def is_shards(name):
    return False


def expand(name):
    return []


def open_shards(*a):
    raise NotImplementedError
