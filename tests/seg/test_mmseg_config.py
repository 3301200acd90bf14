"""The configs of seg/configs, and the recipes that they complete."""

import pytest

pytest.importorskip("mmseg", reason="needs the extra `seg`: pip install addp[seg]")

from addp_core.recipes.config import load
from seg import train as seg_train
from seg.mmseg_config import config_names, read_config


def test_configs_have_the_papers_settings():
    expected = {
        "upernet_addp-b_80k_ade20k-512x512": (80_000, 2e-4, (3, 5, 7, 11)),
        "upernet_addp-l_40k_ade20k-512x512": (40_000, 1e-4, (7, 11, 15, 23)),
    }
    assert expected.keys() < set(config_names())
    for name, (steps, lr, out_indices) in expected.items():
        cfg = read_config(name)
        recipe = seg_train.resolve(load(seg_train.Recipe, None, ["out=o", "data=d", f"config={name}"]), cfg)
        train = recipe.train
        assert (train.steps, train.batch, train.warmup_steps, train.lr) == (steps, 32, 1500, lr)
        assert (train.layer_decay, train.weight_decay, train.drop_path) == (0.85, 0.05, 0.1)
        assert (recipe.data.crop, recipe.relative, cfg.model.backbone.out_indices) == (512, "table", out_indices)
        assert cfg.param_scheduler[1].end == steps
        assert [step.type for step in cfg.train_dataloader.dataset.pipeline[2:6]] == [
            "RandomResize",
            "RandomCrop",
            "RandomFlip",
            "PhotoMetricDistortion",
        ]


@pytest.mark.parametrize("name", config_names())
def test_the_learning_rate_falls_until_the_last_step(name):
    """In the configs themselves, which mmseg's own tools read."""
    cfg = read_config(name)
    warmup, decay = cfg.param_scheduler
    assert (warmup.begin, warmup.end, decay.end) == (0, decay.begin, cfg.train_cfg.max_iters)
