"""Which image goes with which label, and every file below a folder."""

import json
import os

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from mcibi_d2 import InputError
from mcibi_d2.data import SemSegMapper
from mcibi_d2.data.datasets import load_records
from mcibi_d2.data.files import find_files
from mcibi_d2.data.lists import read_list
from mcibi_d2.data.pairs import find_pairs, guess_suffixes
from mcibi_d2.tools import check_dataset
from mcibi_d2.tools.demo import find_inputs


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names(*forms, count=4):
    return [form.format(i) for i in range(count) for form in forms]


# --- names


SUFFIXES = {
    # names of images, of labels -> suffixes that are found
    "mask": ("im{}.jpg", "im{}_mask.png", ("", "_mask")),
    "gif": ("im{}.jpg", "im{}_mask.gif", ("", "_mask")),
    "label ids": ("{}.jpg", "{}_labelIds.png", ("", "_labelIds")),
    "seg, same ending": ("a/{}.png", "a/{}_seg.png", ("", "_seg")),
    "no separator": ("im{}.png", "im{}Mask.png", ("", "Mask")),
    "dot": ("{}.jpg", "{}.mask.png", ("", ".mask")),
    "both": ("ulm_{}_leftImg8bit.png", "ulm_{}_gtFine.png", ("_leftImg8bit", "_gtFine")),
    "both, label first": ("{}_sat.jpg", "{}_mask.png", ("_sat", "_mask")),
    "image alone": ("{}_rgb.png", "{}.png", ("_rgb", "")),
    "a folder each": ("s{}/image.png", "s{}/mask.png", ("image", "mask")),
    "npy": ("{}.jpg", "{}_gt.npy", ("", "_gt")),
}


@pytest.mark.parametrize("one", [True, False], ids=["one folder", "two folders"])
@pytest.mark.parametrize("form", SUFFIXES)
def test_suffixes_are_found_and_pair(form, one, tmp_path):
    image, label, expected = SUFFIXES[form]
    folders = [tmp_path / "x"] if one else [tmp_path / "x", tmp_path / "y"]
    touch(folders[0], *names(image, count=12))
    touch(folders[-1], *names(label, count=12))
    source = list(map(str, folders))
    assert guess_suffixes(source) == expected
    # One folder that is given twice is one folder.
    for given in [source, source * 2] if one else [source]:
        found = find_pairs(given, *expected)
        assert {(p.name, p.label.relative_to(folders[-1]).as_posix()) for p in found.pairs} == {
            (image.format(i), label.format(i)) for i in range(12)
        }
        assert not found.alone and not found.links


def test_ending_alone_tells_labels_in_one_folder(tmp_path):
    touch(tmp_path, *names("{}.jpg", "{}.png"), "alone.jpg")
    assert guess_suffixes([str(tmp_path)]) == ("", ".png")
    found = find_pairs([str(tmp_path)], "", ".png")
    assert [(p.image.name, p.label.name) for p in found.pairs] == [
        (f"{i}.jpg", f"{i}.png") for i in range(4)
    ]
    assert [path.name for path in found.alone] == ["alone.jpg"]


@pytest.mark.parametrize(
    "image, label, suffix",
    [("{}.png", "{}.npy", ".npy"), ("{}.jpg", "{}.jpg.png", ".jpg.png")],
)
def test_other_endings_that_tell_labels_in_one_folder(image, label, suffix, tmp_path):
    touch(tmp_path, *names(image, label))
    assert guess_suffixes([str(tmp_path)]) == ("", suffix)
    found = find_pairs([str(tmp_path)], "", suffix)
    assert [(p.image.name, p.label.name) for p in found.pairs] == [
        (image.format(i), label.format(i)) for i in range(4)
    ]
    assert not found.alone


def test_equal_names_are_not_given_up_for_a_suffix(tmp_path):
    touch(tmp_path / "x", *names("im{}.jpg", count=21), "im1_night.jpg")
    touch(tmp_path / "y", *names("im{}.png", count=21), "im1_night.png")
    source = [str(tmp_path / "x"), str(tmp_path / "y")]
    assert guess_suffixes(source) == ("", "")
    assert len(find_pairs(source).pairs) == 22


@pytest.mark.parametrize("one", [True, False])
def test_several_labels_for_an_image_are_an_error(one, tmp_path):
    folders = [tmp_path / "x"] if one else [tmp_path / "x", tmp_path / "y"]
    touch(folders[0], *names("{}.png"))
    touch(folders[-1], *names("{}_mask.png", "{}_color.png"))
    source = list(map(str, folders))
    with pytest.raises(InputError, match="several labels, whose names end in _color, _mask"):
        guess_suffixes(source)
    found = find_pairs(source, "", "_mask")
    assert len(found.pairs) == 4
    assert len(found.alone if one else found.others) == 4
    # A label that few images have twice is left out, and said.
    for i in range(1, 4):
        (folders[-1] / f"{i}_color.png").unlink()
    assert guess_suffixes(source) == ("", "_mask")
    touch(folders[-1], "0_mask.gif")
    with pytest.raises(InputError, match=r"0_mask\.png: has the name of 0_mask\.gif"):
        find_pairs(source, "", "_mask")


@pytest.mark.parametrize(
    "files",
    [
        names("{}.jpg"),
        ["a.png", "a_mask.png", "b.png", "c.png", "d.png"],
        names("{}_0.png", "{}_1.png"),
    ],
    ids=["no rule", "few", "numbers"],
)  # fmt: skip
def test_one_folder_without_a_rule_is_refused(files, tmp_path):
    touch(tmp_path, *files)
    seen = f"expected LABELS beside it, .*it holds {min(files)}, "
    for source in ([str(tmp_path)], [str(tmp_path)] * 2):
        with pytest.raises(InputError, match=seen):
            guess_suffixes(source)
        with pytest.raises(InputError, match=seen):
            find_pairs(source)


def test_suffix_that_nobody_has_names_the_key_and_files(tmp_path):
    touch(tmp_path / "x", "0.jpg")
    touch(tmp_path / "y", "0_mask.png")
    source = [str(tmp_path / "x"), str(tmp_path / "y")]
    with pytest.raises(InputError, match=r"labels end in '_gt' \(DATASETS.*0_mask\.png"):
        find_pairs(source, "", "_gt")
    # Training does not guess, but the error does.
    with pytest.raises(InputError, match="IMAGE_SUFFIX '' and LABEL_SUFFIX '_mask' pair them"):
        find_pairs(source)
    touch(tmp_path / "nested", "a/1.jpg")
    touch(tmp_path / "flat", "1.png")
    with pytest.raises(InputError, match=r"labels are named as 1\.png, images as a/1\.jpg"):
        find_pairs([str(tmp_path / "nested"), str(tmp_path / "flat")])


# --- an image that is its own label


@pytest.mark.parametrize("link", ["symlink", "hardlink"])
def test_links_to_the_images_are_no_labels(link, tmp_path):
    touch(tmp_path / "x", *names("{}.png"))
    (tmp_path / "y").mkdir()
    for i in range(4):
        (getattr(os, "link" if link == "hardlink" else "symlink"))(
            tmp_path / f"x/{i}.png", tmp_path / f"y/{i}.png"
        )
    with pytest.raises(InputError, match=r"x/0\.png: is its own label, as 4 of 4 images are"):
        find_pairs([str(tmp_path / "x"), str(tmp_path / "y")])


@pytest.mark.parametrize("form", ["txt", "json"])
def test_one_path_in_both_columns_is_refused(form, tmp_path):
    touch(tmp_path, "0.png", "1.png", "1_mask.png")
    pairs = [("0.png", "./0.png"), ("1.png", "1_mask.png")]
    text = "\n".join(map(" ".join, pairs))
    if form == "json":
        text = json.dumps([dict(zip(("image", "label"), pair, strict=True)) for pair in pairs])
    (tmp_path / f"pairs.{form}").write_text(text)
    with pytest.raises(InputError, match=r"0\.png: is its own label, as 1 of 2 images are"):
        find_pairs([str(tmp_path / f"pairs.{form}")])


def test_any_data_set_whose_images_are_their_labels_is_refused(tmp_path):
    for i in range(3):
        Image.new("L", (8, 8)).save(tmp_path / f"{i}.png")
    Image.new("L", (8, 8)).save(tmp_path / "label.png")
    os.symlink(tmp_path / "2.png", tmp_path / "link.png")
    records = [
        {"file_name": str(tmp_path / f"{i}.png"), "sem_seg_file_name": str(tmp_path / label)}
        for i, label in enumerate(["label.png", "1.png", "link.png"])
    ]
    name = "test_pairs_other"
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(stuff_classes=["x", "y"], ignore_label=255)
    try:
        with pytest.raises(InputError, match=r"1\.png: is its own label in test_pairs_other"):
            load_records(name)
        del records[1]
        assert not check_dataset.check(name, 0, tmp_path / "out")
        problems = (tmp_path / f"out/{name}_problems.txt").read_text()
        assert problems.startswith(f"{tmp_path}/2.png: is its own label ({tmp_path}/link.png")
        with pytest.raises(InputError, match=r"2\.png: is its own label"):
            SemSegMapper(True, augmentations=[], dataset_name=name)(records[1])
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


# --- links


def test_linked_folders_are_entered_and_loops_are_not(tmp_path):
    touch(tmp_path / "far", "a/0.png", "b/1.png", ".git/2.png", "a/._0.png")
    touch(tmp_path / "images", "3.png")
    os.symlink(tmp_path / "far", tmp_path / "images/more")
    os.symlink(tmp_path / "far/a/0.png", tmp_path / "images/4.png")
    # To itself, to a folder around it, above the whole, and to what is not there.
    os.symlink(tmp_path / "far", tmp_path / "far/b/again")
    os.symlink("..", tmp_path / "images/up")
    os.symlink("self.png", tmp_path / "images/self.png")
    os.symlink("nowhere.png", tmp_path / "images/gone.png")
    found = find_files(tmp_path / "images", (".png",))
    assert [path.relative_to(tmp_path).as_posix() for path in found.files] == [
        "images/3.png", "images/4.png", "images/more/a/0.png", "images/more/b/1.png",
    ]  # fmt: skip
    assert [sentence.split(": ")[0].split("images/")[1] for sentence in found.left_out] == [
        "gone.png", "more/b/again", "self.png", "up",
    ]  # fmt: skip
    assert "a link to nowhere.png, which is not there" in found.left_out[0]
    # A folder that two links lead to is there twice: image folders may share one of labels.
    os.symlink(tmp_path / "far/a", tmp_path / "images/same")
    assert len(find_files(tmp_path / "images", (".png",)).files) == 5


def test_links_are_followed_everywhere(tmp_path):
    touch(tmp_path / "far", "0.jpg")
    touch(tmp_path / "marks", "0.png")
    for folder, target in (("x", "far"), ("y", "marks")):
        (tmp_path / folder).mkdir()
        os.symlink(tmp_path / target, tmp_path / folder / "linked")
    os.symlink("..", tmp_path / "y/loop")
    found = find_pairs([str(tmp_path / "x"), str(tmp_path / "y")])
    assert [pair.name for pair in found.pairs] == ["linked/0.jpg"]
    assert len(found.links) == 1 and "y/loop: a link to a folder that it is in" in found.links[0]
    inputs, _ = find_inputs([str(tmp_path / "x")])
    assert inputs == [("image", tmp_path / "x/linked/0.jpg", "linked/0")]


# --- lists


PAIRS = [("a/my photo, 1.jpg", "b/1 mask.png"), ("a/2.jpg", "b/2.png")]
PLAIN = [("a/1.jpg", "b/1.png"), ("a/2.jpg", "b/2.png")]
LISTS = {
    "tab": ("{0}\t{1}", PAIRS),
    "comma": ("{0},{1}", PLAIN),
    "comma and blank": ("{0}, {1}", PLAIN),
    "semicolon": ("{0};{1}", PAIRS),
    "blanks": ("{0}   {1} ", PLAIN),
    "quoted, comma": ('"{0}","{1}"', PAIRS),
    "quoted, blank": ('"{0}" "{1}"', PAIRS),
    "headings": ("id;image;mask\n", PAIRS, "7;{0};{1}"),
    "headings, other order": ("mask_path,img_path\n", PLAIN, "{1},{0}"),
    "Detectron2's headings": ("file_name\tsem_seg_file_name\n", PAIRS, "{0}\t{1}"),
    "a column of classes": ("image,label,mask\n", PLAIN, "{0},cat,{1}"),
    "two columns of images": ("image;file_name;mask\n", PAIRS, "7;{0};{1}"),
    "comments": ("# mine\n\n", PLAIN, "{0} {1}"),
    "JSON lines": ("", PAIRS, '{{"file_name": "{0}", "sem_seg_file_name": "{1}", "height": 3}}'),
    "JSON lines, img": ("", PAIRS, '{{"img": "{0}", "mask": "{1}"}}'),
    "JSON lines, classes": ("", PAIRS, '{{"image": "{0}", "label": "cat", "mask": "{1}"}}'),
    "commas in names, blank": ("{0} {1}", [("a,1.jpg", "b,1.png"), ("a,2.jpg", "b,2.png")]),
}


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["unix", "windows"])
@pytest.mark.parametrize("form", LISTS)
def test_every_form_of_list(form, end, tmp_path):
    first, pairs, *rest = LISTS[form]
    line, head = (rest[0], first) if rest else (first, "")
    text = head + "\n".join(line.format(*pair) for pair in pairs) + "\n\n"
    for suffix in (".txt", ".csv", *([".json", ".jsonl"] if form.startswith("JSON") else [])):
        path = tmp_path / f"pairs{suffix}"
        path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", end).encode())
        assert read_list(path) == pairs


@pytest.mark.parametrize("keys", [("file_name", "sem_seg_file_name"), ("Image", "Mask")])
def test_manifests_with_other_keys(keys, tmp_path):
    entries = [dict(zip(keys, pair, strict=True), height=3) for pair in PAIRS]
    (tmp_path / "pairs.json").write_text(json.dumps(entries))
    assert read_list(tmp_path / "pairs.json") == PAIRS


@pytest.mark.parametrize(
    "text, message",
    [
        ("a b\nc e d", r"line 2 is 'c e d', expected .* separated by a tab, a comma"),
        ("a.jpg|b.png", r"line 1 is 'a\.jpg\|b\.png', expected an image and a label, separated"),
        ("x,y\na.jpg,b.png", r"line 1 is 'x,y', expected .* headings such as image,mask"),
        ("a.jpg,b.png,train", r"line 1 is .*, expected .* headings such as image,mask"),
        ("image,mask\na.jpg", r"line 2 is 'a\.jpg', expected an image and a label"),
        ('{"img": "a.jpg"}', r"line 1 is \{'img': 'a\.jpg'\}, expected \{image, label\}"),
        ('{"img": ', r"line 1 cannot be read as JSON"),
        ("a.jpg,\nc.jpg,d.png", r"line 1 is 'a\.jpg,', expected an image and a label"),
    ],
)  # fmt: skip
def test_lists_that_cannot_be_read(text, message, tmp_path):
    (tmp_path / "pairs.txt").write_text(text)
    with pytest.raises(InputError, match=r"pairs\.txt: " + message):
        read_list(tmp_path / "pairs.txt")


def test_paths_of_windows(tmp_path):
    (tmp_path / "pairs.csv").write_text("a\\x.jpg,b\\x.png\n")
    assert read_list(tmp_path / "pairs.csv") == [("a/x.jpg", "b/x.png")]


@pytest.mark.parametrize("form", ["txt", "json"])
def test_two_labels_for_an_image_of_a_list_are_an_error(form, tmp_path):
    pairs = [("0.jpg", "0.png"), ("1.jpg", "1.png"), ("0.jpg", "0.png")]
    for last in ((), [("1.jpg", "1_b.png")]):
        text = "\n".join(map(" ".join, [*pairs, *last]))
        if form == "json":
            keys = ("image", "label")
            text = json.dumps([dict(zip(keys, pair, strict=True)) for pair in [*pairs, *last]])
        (tmp_path / f"pairs.{form}").write_text(text)
        if not last:  # a pair may be repeated
            assert len(find_pairs([str(tmp_path / f"pairs.{form}")]).pairs) == 3
    with pytest.raises(InputError, match=r"1\.jpg has two labels, 1\.png and 1_b\.png"):
        find_pairs([str(tmp_path / f"pairs.{form}")])
