"""Each set of torchvision, from small files in the format of its real download."""

import io
import json
import pickle
import re
import shutil
import tarfile
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import yaml
from PIL import Image

from finetune.data.base import ImageFiles
from finetune.data.torchvision import SETS, torchvision
from finetune.errors import ConfigError, DataError

CONF = Path(__file__).parents[1] / "conf" / "data"
UTILS = "torchvision.datasets.utils"
NETWORK = "finetune.data.torchvision.why_unreachable"

# An image of label k is grey of value 10 k + 5, so that it tells its label.


def grey(label):
    return 10 * label + 5


def image(path, label):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), (grey(label),) * 3).save(path)


def lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row}\n" for row in rows))


def pickled(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content))


def flat(labels):
    """(N, 3072) uint8, as CIFAR stores its images."""
    return np.array([[grey(k)] * 3072 for k in labels], np.uint8)


def cifar10(root):
    folder = root / "cifar-10-batches-py"
    for batch in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5"):
        pickled(folder / batch, {"data": flat([0, 1]), "labels": [0, 1]})
    pickled(folder / "test_batch", {"data": flat([1, 0]), "labels": [1, 0]})
    pickled(folder / "batches.meta", {"label_names": ["airplane", "automobile"]})


def cifar100(root):
    folder = root / "cifar-100-python"
    for part in ("train", "test"):
        pickled(folder / part, {"data": flat([1, 0]), "fine_labels": [1, 0], "coarse_labels": [0]})
    names = {"fine_label_names": ["apple", "aquarium_fish"], "coarse_label_names": ["x"]}
    pickled(folder / "meta", names)


def flowers102(root):
    folder = root / "flowers-102"
    labels = [2, 1, 2, 1, 1, 2]
    for number, label in enumerate(labels, 1):
        image(folder / "jpg" / f"image_{number:05d}.jpg", label - 1)
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": np.array([labels], np.uint8)})
    ids = {"trnid": [[1, 2]], "valid": [[3, 4]], "tstid": [[5, 6]]}
    scipy.io.savemat(folder / "setid.mat", {k: np.array(v, np.uint16) for k, v in ids.items()})


def oxford_iiit_pet(root):
    folder = root / "oxford-iiit-pet"
    for part, number in (("trainval", 1), ("test", 2)):
        breeds = ("Abyssinian", "american_bulldog")
        names = [f"{breed}_{number}" for breed in breeds]
        for label, name in enumerate(names):
            image(folder / "images" / f"{name}.jpg", label)
        rows = [f"{name} {label + 1} {label + 1} 1" for label, name in enumerate(names)]
        lines(folder / "annotations" / f"{part}.txt", *rows)


def dtd(root):
    folder = root / "dtd" / "dtd"
    for number, part in enumerate(("train", "val", "test")):
        names = [f"{name}/{name}_{number:04d}.jpg" for name in ("banded", "blotchy")]
        for label, name in enumerate(names):
            image(folder / "images" / name, label)
        lines(folder / "labels" / f"{part}1.txt", *names)


def fgvc_aircraft(root):
    folder = root / "fgvc-aircraft-2013b" / "data"
    variants = ("707-320", "Boeing 717")
    lines(folder / "variants.txt", *variants)
    for number, part in enumerate(("train", "val", "test")):
        for label in (0, 1):
            image(folder / "images" / f"{number}{label}.jpg", label)
        rows = [f"{number}{label} {variants[label]}" for label in (0, 1)]
        lines(folder / f"images_variant_{part}.txt", *rows)


def stanford_cars(root):
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    names = np.array(["AM General Hummer SUV 2000", "Acura RL Sedan 2012"], object)
    scipy.io.savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})
    for part, table in (
        ("train", "devkit/cars_train_annos.mat"),
        ("test", "cars_test_annos_withlabels.mat"),
    ):
        rows = np.array([(f"{k}.jpg", k + 1) for k in (0, 1)], [("fname", object), ("class", "u1")])
        scipy.io.savemat(folder / table, {"annotations": rows})
        for label in (0, 1):
            image(folder / f"cars_{part}" / f"{label}.jpg", label)


def food101(root):
    for part, number in (("train", 1), ("test", 2)):
        listing = {name: [f"{name}/{number}"] for name in ("apple_pie", "baklava")}
        for label, name in enumerate(listing):
            image(root / "food-101" / "images" / name / f"{number}.jpg", label)
        lines(root / "food-101" / "meta" / f"{part}.json", json.dumps(listing))


def eurosat(root):
    for label, name in enumerate(("AnnualCrop", "Forest")):
        for number in range(10):
            image(root / "eurosat" / "2750" / name / f"{name}_{number}.jpg", label)


def svhn(root):
    for part in ("train", "test"):
        pixels = np.array([grey(1), grey(0)], np.uint8) * np.ones((32, 32, 3, 1), np.uint8)
        labels = np.array([[1], [10]], np.uint8)  # 10 is the digit 0 there
        scipy.io.savemat(root / f"{part}_32x32.mat", {"X": pixels, "y": labels})


def stl10(root):
    folder = root / "stl10_binary"
    lines(folder / "class_names.txt", "airplane", "bird")
    for part in ("train", "test", "unlabeled"):
        pixels = np.ones((2, 3, 96, 96), np.uint8)
        pixels[0], pixels[1] = grey(1), grey(0)
        pixels.tofile(folder / f"{part}_X.bin")
        np.array([2, 1], np.uint8).tofile(folder / f"{part}_y.bin")


def caltech101(root):
    folder = root / "caltech101" / "101_ObjectCategories"
    for label, name in enumerate(("Faces", "accordion", "BACKGROUND_Google")):
        for number in range(1, 11):
            image(folder / name / f"image_{number:04d}.jpg", label)


def gtsrb(root):
    folder = root / "gtsrb"
    for label in (0, 1):
        image(folder / "GTSRB" / "Training" / f"{label:05d}" / "00000_00000.ppm", label)
        image(folder / "GTSRB" / "Final_Test" / "Images" / f"{label:05d}.ppm", label)
    rows = [f"{label:05d}.ppm;20;16;0;0;20;16;{label}" for label in (1, 0)]
    header = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"
    lines(folder / "GT-final_test.csv", header, *rows)


def imagenette(root):
    for part in ("train", "val"):
        for label, wordnet in enumerate(("n01440764", "n02102040")):
            image(root / "imagenette2-320" / part / wordnet / f"{part}_{label}.JPEG", label)


# set: how to write it, two of its class names, images in train, val (None: not published), test
CASES = {
    "cifar10": (cifar10, ("airplane", "automobile"), (10, None, 2)),
    "cifar100": (cifar100, ("apple", "aquarium_fish"), (2, None, 2)),
    "flowers102": (flowers102, ("pink primrose", "hard-leaved pocket orchid"), (2, 2, 2)),
    "oxford_iiit_pet": (oxford_iiit_pet, ("Abyssinian", "American Bulldog"), (2, None, 2)),
    "dtd": (dtd, ("banded", "blotchy"), (2, 2, 2)),
    "fgvc_aircraft": (fgvc_aircraft, ("707-320", "Boeing 717"), (2, 2, 2)),
    "stanford_cars": (
        stanford_cars, ("AM General Hummer SUV 2000", "Acura RL Sedan 2012"), (2, None, 2),
    ),
    "food101": (food101, ("apple_pie", "baklava"), (2, None, 2)),
    "eurosat": (eurosat, ("AnnualCrop", "Forest"), (12, 4, 4)),
    "svhn": (svhn, ("0", "1"), (2, None, 2)),
    "stl10": (stl10, ("airplane", "bird"), (2, None, 2)),
    "caltech101": (caltech101, ("Faces", "accordion"), (12, 4, 4)),
    "gtsrb": (gtsrb, ("speed limit 20", "speed limit 30"), (2, None, 2)),
    "imagenette": (imagenette, ("tench", "English springer"), (2, None, 2)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def any_checksum_is_right(monkeypatch):
    monkeypatch.setattr(f"{UTILS}.check_md5", lambda path, md5: True)


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr(NETWORK, lambda url: "no answer within 8 s")


def parts(splits):
    return [splits.train, splits.val, splits.test]


def test_every_set_has_a_case_and_a_leaf():
    assert set(CASES) == set(SETS)
    leaves = {path.stem: yaml.safe_load(path.read_text()) for path in CONF.glob("*.yaml")}
    named = {stem for stem, leaf in leaves.items() if "torchvision" in leaf.get("defaults", [])}
    assert named == set(SETS)
    assert all(leaves[name]["name"] == name for name in named)


@pytest.mark.parametrize("name", CASES)
def test_files_that_are_there_are_read_without_network_or_decoding(
    tmp_path, monkeypatch, caplog, name
):
    def unwanted(*_):
        raise AssertionError("not while loading")

    write, classes, sizes = CASES[name]
    write(tmp_path)
    with monkeypatch.context() as loading:
        loading.setattr(NETWORK, unwanted)
        loading.setattr(f"{UTILS}._urlretrieve", unwanted)
        loading.setattr("finetune.data.base.read_image", unwanted)
        splits = torchvision(name, root=str(tmp_path))
    assert splits.classes[:2] == classes
    assert [part and len(part) for part in parts(splits)] == list(sizes)
    for part in filter(None, parts(splits)):
        assert set(part.labels) == {0, 1}
        assert all(type(label) is int for label in part.labels)
        for pixels, label in (part[i] for i in range(len(part))):
            assert pixels.shape[0] == 3
            assert abs(int(pixels[0, 0, 0]) - grey(label)) <= 1  # JPEG is lossy
    # these few images are not what was published, and that is said
    published = SETS[name].sizes["train"]
    assert f"images where {published} were published" in caplog.text


@pytest.mark.parametrize("name", sorted(set(SETS) - {"stanford_cars"}))
def test_without_network_it_says_which_files_to_put_where(tmp_path, no_network, name):
    with pytest.raises(DataError) as caught:
        torchvision(name, root=str(tmp_path))
    message = str(caught.value)
    assert message.startswith(f"data={name}: not found in {tmp_path}, and http")
    assert "cannot be reached (no answer within 8 s)" in message
    for url in SETS[name].archives:
        assert url in message
    assert f" in {tmp_path / SETS[name].folder} (or unpacked: " in message
    assert message.endswith("elsewhere: data.root=FOLDER")


def test_stanford_cars_are_no_longer_offered(tmp_path):
    with pytest.raises(DataError) as caught:
        torchvision("stanford_cars", root=str(tmp_path))
    message = str(caught.value)
    assert "its authors offer it no longer. Put devkit/cars_meta.mat" in message
    assert "cars_test_annos_withlabels.mat, cars_train/*.jpg, cars_test/*.jpg in " in message


def test_download_false_never_asks_the_network(tmp_path, monkeypatch):
    monkeypatch.setattr(NETWORK, lambda url: pytest.fail("asked"))
    with pytest.raises(DataError, match=r"or download it: data\.download=true"):
        torchvision("cifar10", root=str(tmp_path / "new"), download=False)
    assert not (tmp_path / "new").exists()


def archived(write, folder):
    """The bytes of a tar.gz of what write makes."""
    write(folder)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for path in folder.iterdir():
            archive.add(path, path.name)
    return buffer.getvalue()


def test_a_set_is_downloaded_and_unpacked_on_first_use(tmp_path, monkeypatch):
    archive = archived(cifar10, tmp_path / "made")
    asked = []

    def retrieve(url, path, chunk_size=0):
        asked.append(url)
        Path(path).write_bytes(archive)

    monkeypatch.setattr(NETWORK, lambda url: None)
    monkeypatch.setattr(f"{UTILS}._get_redirect_url", lambda url, max_hops: url)
    monkeypatch.setattr(f"{UTILS}._urlretrieve", retrieve)
    root = str(tmp_path / "deep" / "datasets")
    assert len(torchvision("cifar10", root=root).train) == 10
    assert len(torchvision("cifar10", root=root).train) == 10
    assert asked == list(SETS["cifar10"].archives)


def test_an_archive_put_there_by_hand_is_unpacked_without_network(tmp_path, no_network):
    root = tmp_path / "datasets"
    root.mkdir()
    archive = archived(cifar10, tmp_path / "made")
    (root / "cifar-10-python.tar.gz").write_bytes(archive)
    assert len(torchvision("cifar10", root=str(root)).test) == 2


@pytest.mark.parametrize(
    "failure",
    [urllib.error.URLError("connection reset"), TimeoutError("timed out"), OSError(28, "No space")],
)
def test_a_broken_download_is_one_message(tmp_path, monkeypatch, failure):
    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(NETWORK, lambda url: None)
    monkeypatch.setattr(f"{UTILS}._get_redirect_url", fail)
    with pytest.raises(DataError, match=r"could not be downloaded and unpacked in .* start again"):
        torchvision("food101", root=str(tmp_path))


def test_a_damaged_archive_is_one_message(tmp_path, no_network):
    (tmp_path / "fgvc-aircraft-2013b.tar.gz").write_bytes(b"half of it")
    with pytest.raises(DataError, match="Delete what is incomplete there and start again"):
        torchvision("fgvc_aircraft", root=str(tmp_path))


def test_a_wrong_checksum_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{UTILS}.check_md5", lambda path, md5: False)
    monkeypatch.setattr(NETWORK, lambda url: None)
    monkeypatch.setattr(f"{UTILS}._get_redirect_url", lambda url, max_hops: url)
    monkeypatch.setattr(f"{UTILS}._urlretrieve", lambda url, path: Path(path).write_bytes(b"x"))
    with pytest.raises(DataError, match="File not found or corrupted"):
        torchvision("cifar100", root=str(tmp_path))


def test_a_folder_that_cannot_be_written_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setattr(NETWORK, lambda url: None)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "file" / "datasets"))):
        torchvision("cifar10", root=str(tmp_path / "file" / "datasets"))


def test_images_missing_after_an_interrupted_unpacking_are_an_error(tmp_path):
    food101(tmp_path)
    shutil.rmtree(tmp_path / "food-101" / "images" / "baklava")
    with pytest.raises(DataError, match=r"1 of 2 images are missing, such as .*baklava/1\.jpg"):
        torchvision("food101", root=str(tmp_path))


def test_an_unknown_name_shows_close_ones():
    with pytest.raises(
        ConfigError, match=r"data\.name: no torchvision set 'cifar'; close: cifar10"
    ):
        torchvision("cifar")
    with pytest.raises(ConfigError, match="there are: cifar10, cifar100, flowers102"):
        torchvision("xyzw")


def test_labels_in_matlabs_format_need_scipy(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install scipy"):
        torchvision("svhn", root=str(tmp_path))


def test_images_in_files_stay_files(tmp_path):
    dtd(tmp_path)
    assert isinstance(torchvision("dtd", root=str(tmp_path)).train.images, ImageFiles)
