"""The classes of ImageNet-A and -R, and the logits they correspond to."""

from pathlib import Path

import pytest
import timm.data

from addp_core.base.errors import UserError
from addp_core.networks.classifier import Classifier
from addp_core.networks.encoder import Encoder, EncoderConfig
from cls.variants.classes import competing_logits, logit_names, match_classes


@pytest.mark.parametrize(("key", "letter"), [("imagenet_a", "a"), ("imagenet_r", "r")])
@pytest.mark.parametrize("numbered", [False, True])
def test_a_model_without_class_names_has_those_of_imagenet(key, letter, numbered):
    model = Classifier(Encoder(EncoderConfig(16, 2, 2), (24, 24), 8), 1000)
    model.class_names = tuple(map(str, range(1000))) if numbered else ()
    names = logit_names(model.class_names, model.num_classes)
    lists = Path(timm.data.__file__).parent / "_info"
    expected = sorted(map(int, (lists / f"imagenet_{letter}_indices.txt").read_text().split()))
    folders = sorted((lists / f"imagenet_{letter}_synsets.txt").read_text().split())
    assert competing_logits(key, "folder", folders, names) == expected
    assert sorted(match_classes(key, "folder", folders, names)) == expected
    assert competing_logits(key, "folder", folders[:3], names) == expected  # a subset of the classes is no easier
    assert competing_logits("sketch", "folder", folders, names) == list(range(1000))


def test_labels_of_a_hub_dataset_are_the_models_only_if_it_has_as_many_classes():
    names, theirs = ["n0", "n1", "n2"], ["tench", "goldfish", "shark"]
    assert match_classes("val", "hfds/all", theirs, names, numbered=True) == [0, 1, 2]
    with pytest.raises(UserError, match="val: hfds/some has 2 classes, such as 'tench', and the model has 3 without"):
        match_classes("val", "hfds/some", theirs[:2], names, numbered=True)
    assert match_classes("val", "hfds/some", ["n2", "n0"], names, numbered=True) == [2, 0]
