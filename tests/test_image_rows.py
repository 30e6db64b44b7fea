"""Images read from their files by rows: the pixels are those of the whole, and nothing is kept."""

import io
import logging
import re
import struct
import sys
import tracemalloc
import zlib

import cv2
import numpy as np
import pytest
from conftest import make_tiny_cfg
from PIL import Image
from test_demo import OPTIONS, run, weights  # noqa: F401

from mcibi_d2 import InputError
from mcibi_d2.data import image_rows, mapper, read_image
from mcibi_d2.data.image_rows import ImageRows, open_rows
from mcibi_d2.predict import Predictor

HEIGHT, WIDTH = 211, 90


def noise(*channels, dtype=np.uint8):
    values = np.random.default_rng(0).integers(
        0, 1 << 8 * dtype().itemsize, (HEIGHT, WIDTH, *channels)
    )
    # Soft, so that a JPEG keeps it, and sharp, so that every value occurs.
    values[: HEIGHT // 2] = cv2.blur(values[: HEIGHT // 2].astype(np.float32), (9, 9)).reshape(
        -1, WIDTH, *channels
    )
    return values.astype(dtype)


def pillow(mode="RGB", form="PNG", source=None, **options):
    """A file's bytes."""
    image = Image.fromarray(noise(3)) if source is None else source
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(noise()))
    file = io.BytesIO()
    image.convert(mode).save(file, form, **options)
    return file.getvalue()


def opencv(suffix, *channels):
    return cv2.imencode(suffix, noise(*channels, dtype=np.uint16))[1].tobytes()


def vips(saver, *channels, dtype=np.uint8, **options):
    pyvips = pytest.importorskip("pyvips")
    values = noise(*channels, dtype=dtype)
    gray = len(channels) == 0 or channels[0] < 3
    kind = {(1, True): "b-w", (1, False): "srgb", (2, True): "grey16", (2, False): "rgb16"}
    image = pyvips.Image.new_from_array(values, interpretation=kind[values.itemsize, gray])
    return getattr(image, f"{saver}_buffer")(**options)


def late(kind, data):
    """A PNG with a chunk after its pixels."""
    png = pillow()
    chunk = kind + data
    chunk = struct.pack(">I", len(data)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return png[:-12] + chunk + png[-12:]


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


BY_ROWS = {
    **{f"PNG {mode}": lambda mode=mode: pillow(mode) for mode in ("RGB", "RGBA", "L", "LA", "1")},
    "PNG of a palette": lambda: pillow("P"),
    "PNG of one transparent color": lambda: pillow(transparency=(7, 8, 9)),
    "PNG of 16 bits": lambda: opencv(".png", 3),
    "PNG of 16 bits and alpha": lambda: opencv(".png", 4),
    "PNG of 16 bits, gray": lambda: opencv(".png"),
    "PNG of 16 bits, gray and alpha": lambda: vips("pngsave", 2, dtype=np.uint16),
    **{
        f"TIFF {mode} {packing}": lambda mode=mode, packing=packing: pillow(
            mode, "TIFF", compression=packing
        )
        for mode in ("RGB", "L")
        for packing in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
    },
    "PNG with a text after its pixels": lambda: late(b"tEXt", b"date\0today"),
    "TIFF RGBA": lambda: pillow("RGBA", "TIFF"),
    "TIFF of 16 bits": lambda: opencv(".tif", 3),
    "TIFF of 16 bits, gray": lambda: opencv(".tif"),
    "TIFF of tiles": lambda: vips(
        "tiffsave", 3, tile=True, tile_width=32, tile_height=16, compression="lzw",
        predictor="horizontal",
    ),
    "TIFF of tiles and 16 bits": lambda: vips("tiffsave", 3, dtype=np.uint16, tile=True),
    "TIFF of JPEGs": lambda: vips("tiffsave", 3, tile=True, compression="jpeg"),
    "TIFF, large numbers": lambda: vips("tiffsave", 3, bigtiff=True),
    "TIFF in several sizes": lambda: vips("tiffsave", 3, tile=True, pyramid=True),
    **{f"JPEG {s}": lambda s=s: pillow("RGB", "JPEG", subsampling=s) for s in (0, 1, 2)},
    "JPEG, progressive": lambda: pillow("RGB", "JPEG", progressive=True),
    "JPEG L": lambda: pillow("L", "JPEG"),
    "JPEG upright": lambda: pillow("RGB", "JPEG", exif=exif(1)),
}  # fmt: skip
WHOLE = {
    "PNG turned": (lambda: pillow(exif=exif(6)), "it is turned, as its EXIF tag says"),
    "PNG upside down": (lambda: pillow(exif=exif(3)), "it is turned"),
    "PNG turned at last": (
        lambda: late(b"eXIf", exif(6).tobytes()[6:]), "its EXIF tags come after its pixels"
    ),
    "PNG turned by a text": (
        lambda: late(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta><rdf:Description "
                     b'tiff:Orientation="8"/></x:xmpmeta>'), "its EXIF tags come after",
    ),
    "PNG interlaced": (lambda: vips("pngsave", 3, interlace=True), "it is interlaced"),
    "JPEG turned": (lambda: pillow("RGB", "JPEG", exif=exif(8)), "it is turned"),
    "JPEG CMYK": (lambda: pillow("CMYK", "JPEG"), "JPEG files of mode CMYK are not read by rows"),
    "TIFF CMYK": (lambda: pillow("CMYK", "TIFF"), "TIFF files of mode CMYK"),
    "TIFF turned": (
        lambda: pillow("RGB", "TIFF", tiffinfo={274: 6}), "it is turned"
    ),
    "TIFF, alpha multiplied": (
        lambda: vips("tiffsave", 4, premultiply=True), r"TIFF files of ExtraSamples \(1,\)",
    ),
    "TIFF, white is zero": (
        lambda: vips("tiffsave", miniswhite=True), "TIFF files of PhotometricInterpretation 0",
    ),
    "TIFF, LZMA": (lambda: pillow("RGB", "TIFF", compression="lzma"), "Compression 34925"),
    "BMP": (lambda: pillow("RGB", "BMP"), "BMP files are not read by rows"),
    "GIF": (lambda: pillow("P", "GIF"), "GIF files are not read by rows"),
}  # fmt: skip


def check_rows(path, rows, white_level=0):
    whole = read_image(str(path), "RGB", white_level=white_level)
    assert rows.size == whole.shape[:2]
    # Windows that overlap, the first again, some that are passed over, and all from the start.
    for start, stop in ((0, 64), (0, 64), (40, 104), (43, 99), (80, 144), (190, 200), (0, 99)):
        if stop <= len(whole):
            found = rows(start, stop)
            assert found.dtype == np.uint8
            assert np.array_equal(found, whole[start:stop])


@pytest.mark.parametrize("name", BY_ROWS)
def test_the_pixels_are_those_of_the_whole(name, tmp_path, monkeypatch, caplog):
    pytest.importorskip("pyvips")
    # Brackets and an ending that is not the format's: libvips would read options and formats.
    path = tmp_path / "grün[2].image"
    path.write_bytes(BY_ROWS[name]())
    monkeypatch.setattr(image_rows, "upright_image", None)  # which has the whole image
    with caplog.at_level(logging.WARNING):
        check_rows(path, open_rows(str(path), "RGB"))
        check_rows(path, open_rows(str(path), "RGB", white_level=4095), 4095)
    whole = read_image(str(path), "BGR")
    assert np.array_equal(open_rows(str(path), "BGR")(3, 70), whole[3:70])
    assert not caplog.records


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_not_read_by_rows_is_read_whole(name, tmp_path, caplog):
    pytest.importorskip("pyvips")
    make, reason = WHOLE[name]
    path = tmp_path / "x"
    path.write_bytes(make())
    with caplog.at_level(logging.WARNING):
        check_rows(path, open_rows(str(path), "RGB"))
    (said,) = caplog.records
    assert said.message.startswith(f"{path}: all of its ") and f" {WIDTH} " in said.message
    assert re.search(reason, said.message)


def test_without_the_extra_the_log_names_it(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "pyvips", None)
    path = tmp_path / "x.png"
    path.write_bytes(pillow())
    with caplog.at_level(logging.WARNING):
        check_rows(path, open_rows(str(path), "RGB"))
    assert "`pip install pyvips[binary]` (the extra `large`)" in caplog.text


def test_torn_files_and_too_large_ones_are_named(tmp_path):
    pytest.importorskip("pyvips")
    for form in ("PNG", "TIFF", "JPEG"):
        path = tmp_path / f"torn.{form}"
        data = pillow("RGB", form)
        path.write_bytes(data[: len(data) * 2 // 3] if form != "TIFF" else data[:-30_000])
        with pytest.raises(InputError, match=rf"torn\.{form}: cannot be read as an image \("):
            open_rows(str(path), "RGB")(0, HEIGHT)
        path.write_bytes(data)
        with pytest.raises(InputError, match=rf"torn\.{form}: .* at most INPUT.MAX_PIXELS 100"):
            open_rows(str(path), "RGB", max_pixels=100)
    with pytest.raises(InputError, match="gone: cannot be read as an image"):
        open_rows("gone", "RGB")


@pytest.mark.parametrize("factor", [1, 2, 7])
def test_reduced(factor, monkeypatch):
    monkeypatch.setattr(image_rows, "_REDUCED_PIXELS", 5000)
    image = noise(3)
    height, width = HEIGHT // factor, WIDTH // factor
    cells = image[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    found = ImageRows.of(image).reduced(factor)
    assert np.abs(found - cells.mean(axis=(1, 3))).max() <= 0.5


SLIDE = ["TEST.INFERENCE", "slide", "TEST.SLIDE.BATCH_SIZE", "2",
         "TEST.SLIDE.WINDOW", "(64, 80)", "TEST.SLIDE.STRIDE", "(40, 50)"]  # fmt: skip
TALL = (1000, WIDTH)


@pytest.fixture
def tall(tmp_path):
    path = tmp_path / "tall.png"
    values = np.random.default_rng(0).integers(0, 256, (30, 12, 3), dtype=np.uint8)
    Image.fromarray(cv2.resize(values, TALL[::-1])).save(path)
    return path


def predictor(tmp_path, weights, *options):  # noqa: F811
    return Predictor(
        make_tiny_cfg(tmp_path / "output", *OPTIONS, *SLIDE, "MODEL.WEIGHTS", weights, *options)
    )


@pytest.mark.parametrize("color_order", ["RGB", "BGR"])
def test_windows_are_read_from_the_file(tall, tmp_path, weights, monkeypatch, color_order):  # noqa: F811
    pytest.importorskip("pyvips")
    monkeypatch.setattr("mcibi_d2.modeling.segmentor.WINDOW_BYTES", 0)
    segment = predictor(tmp_path, weights, "INPUT.FORMAT", color_order)
    whole = segment(tall)
    assert len(np.unique(whole.labels)) > 2
    image = read_image(str(tall), "BGR")
    monkeypatch.setattr("mcibi_d2.predict.LARGE_PIXELS", TALL[0] * TALL[1] - 1)
    # No array and no Pillow image of the whole is made.
    monkeypatch.setattr("mcibi_d2.predict.read_image", None)
    monkeypatch.setattr(mapper, "image_array", None)
    monkeypatch.setattr(Image.Image, "load", None)
    decoded, decode = [], image_rows._FileReader._decoded
    monkeypatch.setattr(
        image_rows._FileReader,
        "_decoded",
        lambda self, *rows: (decoded.append(rows), decode(self, *rows))[1],
    )
    windows = []
    segment.model.backbone.register_forward_pre_hook(
        lambda _, inputs: windows.append(tuple(inputs[0].shape))
    )
    next(segment.bands(tall))
    decoded.clear()
    tracemalloc.start()
    labels = segment.labels(tall)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < image.nbytes / 2
    assert np.array_equal(labels, whole.labels)
    # Each row once, from above.
    assert [start for start, _ in decoded] == [0, *(stop for _, stop in decoded[:-1])]
    assert decoded[-1][1] == TALL[0]
    assert {shape[2:] for shape in windows} == {(64, 80)}
    # Every other way to ask gives the same, and so does an array.
    for given in (str(tall), segment.read(tall), image):
        found = segment([given])[0]
        assert np.array_equal(found.labels, whole.labels)
        assert np.array_equal(found.scores, whole.scores)
        assert np.array_equal(found.overlay, whole.overlay)
    for given in (tall, image):
        bands = list(segment.bands(given))
        assert np.array_equal(np.concatenate([labels for labels, _ in bands]), whole.labels)
        assert np.array_equal(np.concatenate([scores for _, scores in bands]), whole.scores)


def test_scores_are_made_where_they_are_asked_for(tall, tmp_path, weights, monkeypatch):  # noqa: F811
    segment = predictor(tmp_path, weights)
    expected = segment.predict(tall)[0]
    monkeypatch.setattr("mcibi_d2.predict._band", None)
    assert np.array_equal(segment.labels(tall), expected)
    assert [x.shape for x in segment.labels([tall, read_image(str(tall), "BGR")[:99]])] == [
        TALL, (99, WIDTH),
    ]  # fmt: skip
    assert segment.labels([]) == []


@pytest.mark.parametrize(
    "options",
    [["TEST.INFERENCE", "whole"], ["INPUT.MIN_SIZE_TEST", "100"],
     ["INPUT.TEST_RESIZE", "fixed", "INPUT.FIXED_SIZE_TEST", "(1000, 100)"]],
)  # fmt: skip
def test_what_goes_through_the_network_whole_is_said_once(
    tall, tmp_path, weights, monkeypatch, caplog, options  # noqa: F811
):  # fmt: skip
    segment = predictor(tmp_path, weights, "INPUT.MAX_SIZE_TEST", "9999", *options)
    monkeypatch.setattr("mcibi_d2.predict.LARGE_PIXELS", TALL[0] * TALL[1] - 1)
    with caplog.at_level(logging.WARNING, "mcibi_d2.predict"):
        for _ in range(2):
            assert segment.labels(tall).shape == TALL
    said = [record.message for record in caplog.records if record.name == "mcibi_d2.predict"]
    assert len(said) == 1
    assert said[0].startswith(f"An image of {WIDTH} x 1000 pixels (width x height) is in memory")
    caplog.clear()
    smaller = predictor(tmp_path, weights, "INPUT.MIN_SIZE_TEST", "50")
    assert smaller.labels(tall).shape == TALL
    assert "is in memory" not in caplog.text


def test_demo_of_a_large_image(tall, tmp_path, weights, monkeypatch, capsys):  # noqa: F811
    pytest.importorskip("pyvips")
    expected = predictor(tmp_path, weights)(tall)
    (tmp_path / "in").mkdir()
    tall.rename(tmp_path / "in" / "tall.png")
    cv2.imwrite(str(tmp_path / "in" / "small.png"), noise(3)[:64])
    torn = (tmp_path / "in" / "tall.png").read_bytes()
    (tmp_path / "in" / "torn.png").write_bytes(torn[: len(torn) // 2])
    for module in ("predict", "tools.demo"):
        monkeypatch.setattr(f"mcibi_d2.{module}.LARGE_PIXELS", TALL[0] * TALL[1] // 4)
    for more in ([], ["--labels", "--confidence"]):
        output = tmp_path / f"out{len(more)}"
        with monkeypatch.context() as patch:
            if not more:
                patch.setattr(Predictor, "predict", None)  # the scores of all pixels
            run(patch, weights, output, tmp_path / "in", options=more, opts=SLIDE)
        assert f"skipped {tmp_path / 'in' / 'torn.png'}: cannot be" in capsys.readouterr().out
        # A half of each side.
        drawn = cv2.imread(str(output / "tall.jpg"))
        assert drawn.shape[0] == TALL[0] // 2 and WIDTH // 2 < drawn.shape[1] < 10 * WIDTH
        small = cv2.resize(
            expected.overlay, (WIDTH // 2, TALL[0] // 2), interpolation=cv2.INTER_AREA
        )
        assert np.abs(drawn[:, : WIDTH // 2].astype(int) - small).mean() < 15
        assert cv2.imread(str(output / "small.jpg")).shape[1] > WIDTH
    labels = cv2.imread(str(output / "tall_labels.png"), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(labels, expected.labels)
    confidence = cv2.imread(str(output / "tall_confidence.png"), cv2.IMREAD_UNCHANGED)
    assert np.abs(confidence / 255 - expected.scores).max() < 0.002
