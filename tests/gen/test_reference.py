"""The reference of `addp evaluate`: its features are cached, it is resized and cropped as published."""

import json
import os
import tarfile

import numpy as np
import pytest
from evaluation import HW, evaluate_command, noise, photographs, report_rows, write_images
from PIL import Image
from shard_server import serve
from torchvision import transforms

from addp_core.data.images import LazyImage
from addp_core.recipes.cli import main
from gen.features import ResizeAndCrop

pytest.importorskip("torch_fidelity", reason="needs torch-fidelity: pip install 'addp[gen]'")
pytestmark = pytest.mark.usefixtures("offline")


def test_reference_features_are_cached_until_its_images_change(sets, tmp_path, capsys):
    reference = write_images(tmp_path / "reference", photographs(8, 3))
    arguments = evaluate_command(sets, tmp_path / "out", f"images={sets / 'a'}", f"reference={reference}")
    assert main(arguments) == 0
    before = report_rows(tmp_path / "out")
    assert "features kept in" in capsys.readouterr().err
    reference = reference.rename(tmp_path / "moved")  # the cache goes by content, not by path
    arguments = evaluate_command(sets, tmp_path / "out", f"images={sets / 'a'}", f"reference={reference}")
    assert main(arguments) == 0
    assert "features found in" in capsys.readouterr().err
    assert report_rows(tmp_path / "out") == before
    (cached,) = (path for path in (tmp_path / "cache").iterdir())
    assert main([f"reference={cached}" if a.startswith("reference") else a for a in arguments]) == 0
    assert report_rows(tmp_path / "out") == before
    Image.fromarray(noise(1)[0]).save(reference / "000.png")
    assert main(arguments) == 0
    assert "features kept in" in capsys.readouterr().err
    assert report_rows(tmp_path / "out") != before


def test_two_runs_fill_the_cache_at_once(sets, tmp_path, monkeypatch):
    """The second run starts while the first one extracts, and finishes before it."""
    from gen import reference

    arguments = evaluate_command(sets, tmp_path / "one", f"images={sets / 'a'}")
    extract_features = reference.extract_features
    second_runs = [[f"out={tmp_path / 'two'}" if a.startswith("out=") else a for a in arguments]]

    def extract_with_second_run(*arguments):
        features = extract_features(*arguments)
        if second_runs:
            assert main(second_runs.pop()) == 0
        return features

    monkeypatch.setattr(reference, "extract_features", extract_with_second_run)
    cache = tmp_path / "cache"
    for name in (".tmp-stale", ".tmp-recent"):
        (cache / name).mkdir(parents=True)
    os.utime(cache / ".tmp-stale", (0, 0))  # left by a run that was killed long ago
    assert main(arguments) == 0
    assert report_rows(tmp_path / "one") == report_rows(tmp_path / "two")
    (cached,) = (path for path in cache.iterdir() if path.name != ".tmp-recent")
    assert {path.name for path in cached.iterdir()} >= {"about.json", "features.npy"}


def test_a_reference_of_other_sizes_is_cropped_to_the_size_of_the_images(sets, tmp_path):
    rng = np.random.default_rng(0)
    big = [rng.integers(0, 256, (60 + i, 70, 3), dtype=np.uint8) for i in range(6)]
    imagenet = tmp_path / "imagenet"
    write_images(imagenet / "val" / "cat", big[:3])
    write_images(imagenet / "val" / "dog", big[3:])
    write_images(imagenet / "train" / "cat", big[:1])
    assert main(evaluate_command(sets, tmp_path / "out", f"images={sets / 'a'}", f"reference={imagenet}")) == 0
    (cached,) = (tmp_path / "cache").iterdir()
    about = json.loads((cached / "about.json").read_text())
    assert about["images"] == 6
    assert about["size"] == list(HW)


def test_the_reference_is_resized_and_cropped_as_published_and_the_cache_knows_how(sets, tmp_path, capsys):
    """The published script: torchvision's Resize and CenterCrop with their defaults, written as PNG."""
    rng = np.random.default_rng(0)
    sizes = ((60, 70), (70, 61), (33, 90), (24, 32), (25, 200), (97, 31))
    big = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    square = transforms.Compose([transforms.Resize(24), transforms.CenterCrop(24), transforms.PILToTensor()])
    for pixels in big:
        ours = ResizeAndCrop((24, 24), "bilinear")(LazyImage(Image.fromarray(pixels)))
        assert (ours == square(Image.fromarray(pixels))).all()
    reference = write_images(tmp_path / "reference", big)
    prepared = [ResizeAndCrop(HW, "bilinear")(LazyImage(Image.fromarray(pixels))) for pixels in big]
    published = write_images(tmp_path / "published", [image.permute(1, 2, 0).numpy() for image in prepared])
    distances = {}
    for key, folder, *settings in (
        ("default", reference),
        ("published", published),
        ("bicubic", reference, "reference_resize=bicubic"),
    ):
        out = tmp_path / key
        assert main(evaluate_command(sets, out, f"images={sets / 'a'}", f"reference={folder}", *settings)) == 0
        distances[key] = report_rows(out)[0]["fd"]
        assert "features kept in" in capsys.readouterr().err
    assert distances["default"] == distances["published"] != distances["bicubic"]
    assert json.loads((tmp_path / "default" / "evaluation.json").read_text())["reference_resize"] == "bilinear"
    abouts = [json.loads((folder / "about.json").read_text()) for folder in (tmp_path / "cache").iterdir()]
    assert sorted(about["resize"] for about in abouts) == ["bicubic", "bilinear", "bilinear"]


def test_cached_features_of_another_resize_are_pointed_out(sets, tmp_path, capsys):
    assert main(evaluate_command(sets, tmp_path / "out", f"images={sets / 'a'}")) == 0
    (cached,) = (tmp_path / "cache").iterdir()
    again = evaluate_command(sets, tmp_path / "out", f"images={sets / 'a'}", f"reference={cached}")
    capsys.readouterr()
    assert main(again) == 0
    assert "were resized by" not in capsys.readouterr().err
    about = json.loads((cached / "about.json").read_text())
    del about["resize"]  # as in caches of an earlier version, which resized bicubically
    (cached / "about.json").write_text(json.dumps(about))
    assert main(again) == 0
    assert "were resized by bicubic, not by reference_resize=bilinear" in capsys.readouterr().err


def test_cached_features_of_images_of_another_size_are_pointed_out(sets, tmp_path, capsys):
    assert main(evaluate_command(sets, tmp_path / "out", f"images={sets / 'a'}")) == 0
    (cached,) = (tmp_path / "cache").iterdir()
    about = json.loads((cached / "about.json").read_text())
    (cached / "about.json").write_text(json.dumps(about | {"size": [4, 5]}))
    assert main(evaluate_command(sets, tmp_path / "out", f"images={sets / 'a'}", f"reference={cached}")) == 0
    assert f"{cached} had 4 x 5 pixels" in capsys.readouterr().err


def test_images_and_reference_in_shards_at_an_address(sets, tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "indexes"))
    (tmp_path / "shards").mkdir()
    for name in ("a", "b"):
        with tarfile.open(tmp_path / "shards" / f"{name}.tar", "w") as tar:
            tar.add(sets / name, ".")
    assert main(evaluate_command(sets, tmp_path / "disk", f"images={sets / 'a'}")) == 0
    with serve(tmp_path / "shards") as server:
        keys = [f"images={server.url}/a.tar", f"reference={server.url}/b.tar", f"cache={tmp_path / 'other'}"]
        assert main(evaluate_command(sets, tmp_path / "address", *keys)) == 0
    there, here = (report_rows(tmp_path / name)[0] for name in ("address", "disk"))
    assert there == {**here, "name": f"{server.url}/a.tar"}


def test_external_statistics_give_the_distance_alone(sets, tmp_path, expect_user_error):
    assert main(evaluate_command(sets, tmp_path / "out", f"images={sets / 'a'}")) == 0
    (cached,) = (tmp_path / "cache").iterdir()
    file = tmp_path / "external.npz"
    np.savez(file, mu=np.load(cached / "mean.npy"), sigma=np.load(cached / "covariance.npy"))
    distance = report_rows(tmp_path / "out")[0]["fd"]
    assert main(evaluate_command(sets, tmp_path / "out", f"images={sets / 'a'}", f"reference={file}")) == 0
    (row,) = report_rows(tmp_path / "out")
    assert row["fd"] == pytest.approx(distance)
    assert "precision" not in row
    np.savez(file, mu=np.zeros(7), sigma=np.eye(7))
    expect_user_error(evaluate_command(sets, tmp_path / "out", f"images={sets / 'a'}", f"reference={file}"), "mu (7,)")
    file.write_bytes(b"nothing")
    expect_user_error(
        evaluate_command(sets, tmp_path / "out", f"images={sets / 'a'}", f"reference={file}"),
        "expected mu and sigma",
    )
