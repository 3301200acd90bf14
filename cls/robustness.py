"""`addp robustness`: top-1 on ImageNet-A, -R and -Sketch, 1 - mCE on ImageNet-C, and their mean, as in the paper.

Datasets are read as their authors publish them: <class>/<image>, and <corruption>/<severity>/<class>/<image> for
ImageNet-C, perhaps below blur/, digital/, noise/ and weather/. Classes are matched by the names of their folders; on
ImageNet-A and -R only the logits of the dataset's own classes compete. Without ImageNet-C, `corrupt` generates its
corruptions from clean images; such results are labeled as generated. Every dataset, and every corruption at every
severity, is evaluated once and kept in <out>/cells.json; the table goes to stdout and to <out>/robustness.md, .csv and
results.json.
"""

import sys
from dataclasses import replace
from pathlib import Path

from addp_core.base.errors import UserError
from addp_core.recipes.config import dump
from addp_core.training.compute import accelerate_model
from addp_core.training.precision import matrix_width, resolve_precision
from addp_core.training.processes import process_state
from addp_core.training.run_folder import check_out, claim_out
from cls.results import RESULTS
from cls.variants.classifiers import open_classifier
from cls.variants.datasets import DATASETS, IMAGENET_C_KEYS, DatasetPart
from cls.variants.evaluation import Counts, Evaluator
from cls.variants.recipe import Recipe
from cls.variants.report import CSV, MARKDOWN, markdown_report, summarize, write_report
from cls.variants.store import RESULTS_FILE, ResultStore, result_key

WRITTEN = (RESULTS, MARKDOWN, CSV, RESULTS_FILE)  # in `out`


def run(recipe: Recipe) -> None:
    """Evaluate what is not in `out` yet, then write the report.

    Raises UserError, before anything is evaluated, if no dataset is given, if a dataset has classes that the model does
    not have, if ImageNet-C is incomplete, or if `out` is the folder of another verb or of a process at work.
    """
    out = Path(recipe.out)
    check_out(out, recipe, WRITTEN)
    keys = [key for key in DATASETS if getattr(recipe, key)]
    if not keys:
        raise UserError(
            f"no dataset given; expected at least one of {', '.join(f'{key}=<folder>' for key in DATASETS)}"
        )
    if all(getattr(recipe, key) for key in IMAGENET_C_KEYS):
        raise UserError(f"{', '.join(IMAGENET_C_KEYS)}: found both, expected one: their results are never mixed")
    state = process_state()
    classifier = open_classifier(recipe)
    width = matrix_width(classifier.model)
    recipe = replace(recipe, precision=resolve_precision(recipe.precision, state.device, width))
    evaluator = Evaluator(recipe, classifier)
    parts = evaluator.parts(keys)
    classifier.model.to(state.device)
    accelerate_model(classifier.model)
    with claim_out(out, recipe, WRITTEN):
        store = ResultStore(out, state)
        store.open(dump(recipe))
        results = evaluate_parts(evaluator, parts, store)
        if state.is_main_process:
            report = summarize(classifier.title, results)
            write_report(out, report)
            sys.stdout.write(markdown_report(report))


def evaluate_parts(evaluator: Evaluator, parts: list[DatasetPart], store: ResultStore) -> dict[DatasetPart, Counts]:
    """Return the results on all parts; those that the store lacks are evaluated, as are images that it lacks."""
    results: dict[DatasetPart, Counts] = {}
    for number, part in enumerate(parts, 1):
        source, title = evaluator.open(part), f"{part.title} ({number}/{len(parts)})"
        indices = evaluator.indices(part, source)
        key = result_key(evaluator.settings(part, source, len(indices)))
        stored = store.counts.get(key)
        if stored is None or stored.images + len(stored.unreadable) != len(indices):
            store.add(key, part, evaluator.evaluate(part, source, indices, title))
        elif stored.unreadable:
            store.add(key, part, evaluator.evaluate_unreadable(part, source, stored, title))
        results[part] = store.counts[key]
    return results
