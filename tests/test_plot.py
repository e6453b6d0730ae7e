"""Pictures: geometry of sheets, frames of GIFs, curves, and the page that needs nothing from outside."""

import base64
import io
import math
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from undiffuse import InputError, plot


def samples(n, channels=1, h=3, w=5):
    """Random samples in [-1, 1], different in every pixel."""
    return torch.rand(n, channels, h, w, generator=torch.Generator().manual_seed(0)) * 2 - 1


class Outside(HTMLParser):
    """Collects what a page would load from outside, its tags and its text."""

    def __init__(self, page):
        super().__init__()
        self.loads, self.tags, self.words = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag in ("link", "script", "iframe", "object", "embed"):
            self.loads.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "poster", "data") and not value.startswith(("data:", "#")):
                self.loads.append(value)
            if name == "style" and "url(" in value:
                self.loads.append(value)

    def handle_data(self, data):
        self.words.append(data)
        if self.tags and self.tags[-1] == "style":
            self.loads += [word for word in ("url(", "@import", "://") if word in data]


def test_bytes_are_those_that_loading_maps_back():
    every = torch.arange(256).reshape(4, 1, 8, 8)
    assert np.array_equal(plot.to_uint8(every / 127.5 - 1), every[:, 0].numpy())
    assert plot.to_uint8(torch.tensor([[[[-7.0, -1, 1, 7]]]])).tolist() == [[[0, 0, 255, 255]]]
    assert plot.to_uint8(torch.ones(1, 1, 1, 1, dtype=torch.bfloat16, requires_grad=True)).dtype == np.uint8


@pytest.mark.parametrize(("channels", "shape"), [(1, (2, 3, 5)), (2, (2, 3, 5)), (3, (2, 3, 5, 3)), (4, (2, 3, 5))])
def test_three_channels_are_colours_and_others_show_the_first(channels, shape):
    x = samples(2, channels)
    pixels = plot.to_uint8(x)
    assert pixels.shape == shape
    expected = torch.round((x + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(pixels, expected if channels == 3 else expected[..., 0])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("n", "columns", "scale", "gap"), [(7, 3, 4, 2), (4, 2, 1, 0), (3, 8, 2, 5), (1, 1, 6, 4)])
def test_tiles_lie_on_their_grid_with_white_between(n, columns, scale, gap, channels):
    x = samples(n, channels).clamp(max=0.9)
    sheet = plot.tile(x, columns, scale, gap)
    pixels, across, w, h = np.asarray(sheet), min(columns, n), 5 * scale + gap, 3 * scale + gap
    assert sheet.size == (across * w + gap, math.ceil(n / across) * h + gap)
    assert sheet.mode == ("RGB" if channels == 3 else "L")
    rest = np.ones(pixels.shape[:2], bool)
    for i, picture in enumerate(plot.to_uint8(x)):
        row, column = divmod(i, across)
        box = np.s_[gap + row * h : (row + 1) * h, gap + column * w : (column + 1) * w]
        assert np.array_equal(pixels[box], picture.repeat(scale, 0).repeat(scale, 1))
        rest[box] = False
    assert (pixels[rest] == 255).all()
    assert (pixels[~rest] < 255).all()


def test_smooth_tiles_keep_constants_and_ramps_and_soften_edges():
    flat = np.asarray(plot.tile(torch.full((1, 1, 4, 4), 0.2), 1, 5, 0, smooth=True))
    assert np.ptp(flat) == 0
    ramp = torch.linspace(-1, 1, 9).expand(1, 1, 9, 9)
    row = np.asarray(plot.tile(ramp, 1, 4, 0, smooth=True))[18].astype(float)
    place = (np.arange(36) + 0.5) / 4 - 0.5
    assert np.abs(row - 255 * place / 8)[8:28].max() <= 1
    step = torch.ones(1, 1, 2, 4) * torch.tensor([-1.0, -1, 1, 1])
    assert len(np.unique(np.asarray(plot.tile(step, 1, 8, 0)))) == 2
    assert len(np.unique(np.asarray(plot.tile(step, 1, 8, 0, smooth=True)))) > 4


@pytest.mark.parametrize("shape", [(4, 1, 8), (4, 8, 8), (2, 1, 4, 4, 4)])
def test_data_that_are_no_images_are_refused(shape, tmp_path):
    for draw in (lambda x: plot.tile(x, 2), lambda x: plot.save_png(x, tmp_path / "x.png")):
        with pytest.raises(InputError, match=r"only images .* can be drawn, got \(" + ", ".join(map(str, shape))):
            draw(torch.zeros(shape))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("shape", "columns"),
    [
        pytest.param((0, 1, 4, 4), 2),
        pytest.param((2, 0, 4, 4), 2),
        pytest.param((2, 1, 4, 4), 0),
    ],
)
def test_empty_sheets_are_refused(shape, columns):
    with pytest.raises(InputError):
        plot.tile(torch.zeros(shape), columns)


@pytest.mark.parametrize(("side", "scale"), [(8, 8), (28, 2), (64, 1), (100, 1)])
def test_png_enlarges_small_images(tmp_path, side, scale):
    x = samples(3, 1, side, side)
    plot.save_png(x, tmp_path / "x.png", columns=2)
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.format == "PNG"
        assert np.array_equal(np.asarray(picture), np.asarray(plot.tile(x, 2, scale)))
        assert picture.width == 2 * side * scale + 12


def frames(n):
    """Pictures of one grey each, 16 apart."""
    return [Image.new("L", (12, 8), 16 * i) for i in range(n)]


@pytest.mark.parametrize(("n", "hold"), [(2, 3), (5, 0), (9, 14)])
def test_gif_shows_every_frame_and_rests_on_the_last(tmp_path, n, hold):
    plot.save_gif(frames(n), tmp_path / "x.gif", milliseconds=50, hold=hold)
    with Image.open(tmp_path / "x.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["loop"]) == (n, (12, 8), 0)
        durations = []
        for i in range(n):
            gif.seek(i)
            durations.append(gif.info["duration"])
            assert (np.asarray(gif.convert("L")) == 16 * i).all()
    assert durations == [50] * (n - 1) + [50 * (1 + hold)]


def test_gif_of_samples_is_close_to_the_samples(tmp_path):
    path = torch.linspace(0, 1, 4).reshape(4, 1, 1, 1, 1) * samples(6, 1, 8, 8)
    sheets = [plot.tile(x, 3) for x in path]
    plot.save_gif(sheets, tmp_path / "x.gif")
    with Image.open(tmp_path / "x.gif") as gif:
        for i, sheet in enumerate(sheets):
            gif.seek(i)
            error = np.asarray(gif.convert("L")).astype(float) - np.asarray(sheet)
            assert np.abs(error).max() <= 24


def test_gif_without_frames_is_refused(tmp_path):
    with pytest.raises(InputError):
        plot.save_gif([], tmp_path / "x.gif")


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_data_uri_holds_the_file(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    frames(3)[2].save(path)
    head, body = plot.data_uri(path).split(",")
    assert head == f"data:image/{suffix};base64"
    assert base64.b64decode(body, validate=True) == path.read_bytes()


def test_files_that_are_no_pictures_are_refused(tmp_path):
    (tmp_path / "x.txt").write_text("words")
    with pytest.raises(InputError, match=r"x\.txt"):
        plot.data_uri(tmp_path / "x.txt")


def test_image_uri_holds_the_picture():
    sheet = plot.tile(samples(4, 3), 2)
    head, body = plot.image_uri(sheet).split(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(body, validate=True))) as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(sheet))


def test_the_check_for_outside_resources_sees_them():
    for bad in (
        '<img src="https://example.org/a.png">',
        '<img src="samples.png">',
        '<link rel="stylesheet" href="a.css">',
        "<script>1</script>",
        "<style>@import 'a.css';</style>",
        "<style>p { background: url(a.png); }</style>",
    ):
        assert Outside(bad).loads


def test_page_is_complete_and_self_contained():
    uri = plot.image_uri(plot.tile(samples(4), 2))
    table = plot.table_html(["lam", "<u>a</u>"], [["1", "<i>x</i>"], ["2", "&amp;"]])
    page = plot.page("noise & <data>", f'<h1>Report</h1><img src="{uri}" alt="samples">{table}')
    seen = Outside(page)
    assert seen.loads == []
    assert page.startswith("<!doctype html>")
    assert [seen.tags.count(tag) for tag in ("html", "head", "title", "style", "main", "img")] == [1] * 6
    assert not {"i", "u", "data"} & set(seen.tags)
    assert "noise & <data>" in seen.words
    assert '<meta charset="utf-8">' in page
    assert uri in page


def test_table_has_its_cells_as_plain_text():
    rows = [["heun", "1.5", "<b>&</b>"], ["ddim", '"2"', "é"]]
    seen = Outside(plot.table_html(["solver", "5 > 4", "x"], rows))
    assert [seen.tags.count(tag) for tag in ("table", "tr", "th", "td", "b")] == [1, 3, 3, 6, 0]
    assert seen.words == ["solver", "5 > 4", "x", *rows[0], *rows[1]]


@pytest.fixture
def drawn(monkeypatch):
    """The axes of every figure, kept before it is written and closed."""
    axes, save = [], plot._save
    monkeypatch.setattr(plot, "_save", lambda figure, path: (axes.extend(figure.axes), save(figure, path)))
    return axes


LEVELS = [{"lam": lam, "mse": share * 2.0, "linear": 2.0} for lam, share in ((-3.0, 0.9), (0.0, 0.5), (3.0, 0.7))]


def test_levels_are_drawn_as_a_share_of_the_linear_error(tmp_path, drawn):
    from matplotlib import pyplot

    plot.plot_levels(LEVELS, tmp_path / "x.png")
    curve = drawn[0].lines[1]
    assert np.allclose(curve.get_xydata(), [[-3, 0.9], [0, 0.5], [3, 0.7]])
    assert list(drawn[0].lines[0].get_ydata()) == [1, 1]
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (960, 480)
    assert pyplot.get_fignums() == []


def test_a_network_worse_than_linear_stays_in_the_picture(tmp_path, drawn):
    plot.plot_levels([{**LEVELS[0], "mse": 6.0}, *LEVELS[1:]], tmp_path / "x.png")
    assert drawn[0].get_ylim()[1] >= 3


def curves(n):
    """Distances over steps of `n` solvers."""
    return {f"solver {i}": {5: 8.0 + i, 10: 4.0 + i, 20: 2.0 + i} for i in range(n)}


@pytest.mark.parametrize("n", [1, 3, 4, pytest.param(5)])
def test_every_solver_has_its_curve_and_name(tmp_path, drawn, n):
    plot.plot_distances(curves(n), 1.5, "distance", tmp_path / "x.png")
    (axes,) = drawn
    named = {line.get_label(): line for line in axes.lines}
    assert list(named) == [*curves(n), "real against real"]
    for name, values in curves(n).items():
        assert named[name].get_xydata().tolist() == [[float(k), v] for k, v in values.items()]
    assert list(named["real against real"].get_ydata()) == [1.5, 1.5]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["5", "10", "20"]
    assert (axes.get_xscale(), axes.get_yscale(), axes.get_ylabel()) == ("log", "log", "distance")
    assert len({line.get_color() for line in axes.lines}) == n + 1
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_drawing_leaves_the_callers_matplotlib_alone(tmp_path, monkeypatch):
    import matplotlib

    before = matplotlib.get_backend()
    matplotlib.use("svg")
    try:
        plot.plot_levels(LEVELS, tmp_path / "x.png")
        assert matplotlib.get_backend() == "svg"
    finally:
        matplotlib.use(before)
