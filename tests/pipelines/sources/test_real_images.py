"""Real images are listed and read from folders and from tars, in which they keep their published names."""

import io
import json
import tarfile

import pytest

from pipelines.sources import SourceError
from pipelines.sources.coco import image_file_names
from pipelines.sources.real_images import list_real_images, read_real_image


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))


def metadata(url):
    return json.dumps({"url": url, "key": "0"}).encode()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b.jpg").write_bytes(b"b")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "a.PNG").write_bytes(b"a")
    (tmp_path / "notes.txt").write_text("no image")
    write_tar(
        tmp_path / "00000.tar",
        {
            "0002.jpg": b"two",
            "0002.json": metadata("http://images/val2017/000000000139.jpg?size=1"),
            "0001.jpg": b"one" * 400,
            "0001.json": b"no json",
            "0003.txt": b"a caption alone",
        },
    )
    return tmp_path


def test_images_of_folders_and_tars_are_listed(folder):
    images = list_real_images(str(folder))
    assert [image.file_name for image in images] == ["0001.jpg", "000000000139.jpg", "b.jpg", "a.PNG"]
    assert [read_real_image(image.name) for image in images] == [b"one" * 400, b"two", b"b", b"a"]
    # Units are recognised by these last parts.
    assert images[0].name.endswith("/0001.jpg")


def test_a_tar_that_was_changed_is_refused(folder):
    [name, *_] = [image.name for image in list_real_images(str(folder))]
    write_tar(folder / "00000.tar", {"0009.jpg": b"nine"})
    with pytest.raises(SourceError, match=r"00000\.tar was changed: 0001\.jpg is no longer"):
        read_real_image(name)


def test_a_damaged_tar_is_refused(folder):
    path = folder / "00000.tar"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(SourceError, match=r"00000\.tar is damaged"):
        list_real_images(str(folder))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "has no 'images'"),
        ('{"annotations": []}', "has no 'images'"),
        ('{"images": [{"id": 1}]}', "has no 'images'"),
        ("{", "not readable as JSON"),
        (None, "no such file"),
    ],
)
def test_annotations_without_images_are_refused(tmp_path, content, message):
    path = tmp_path / "captions.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SourceError, match=message):
        image_file_names(str(path))


def test_file_names_are_those_of_the_annotations(tmp_path):
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"images": [{"id": 42, "file_name": "COCO_val2014_000000000042.jpg"}, 7]}))
    assert image_file_names(str(path)) == {"42": "COCO_val2014_000000000042.jpg"}
