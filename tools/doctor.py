"""`addp doctor`: what is installed, what each task lacks, and the command that adds it.

torch is looked at in a process of its own, so that a broken installation is a finding and not a crash. The exit code is
0 whatever is found.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from packaging.requirements import Requirement

import addp_core

PIP = f"{shlex.quote(sys.executable)} -m pip install"
PROBE_SECONDS = 180


@dataclass
class Recipe:
    """Keys of `addp doctor`."""

    json: Annotated[bool, "print JSON instead of text"] = False
    imports: Annotated[bool, "import every package too: slower, and finds those that are installed but broken"] = False


@dataclass(frozen=True)
class Package:
    """A package by the name it is imported under, the distributions that bring it, and its extra of `addp`."""

    module: str
    distributions: tuple[str, ...]
    extra: str = ""


@dataclass(frozen=True)
class Task:
    """The folder of a task, what it cannot do without, and what `optional` packages add to it (module -> what for)."""

    folder: str
    needs: tuple[str, ...]
    optional: dict[str, str] = field(default_factory=dict)


def _package(module: str, *distributions: str, extra: str = "") -> tuple[str, Package]:
    return module, Package(module, distributions or (module,), extra)


PACKAGES = dict(
    [
        _package("torch"),
        _package("torchvision"),
        _package("timm"),
        _package("accelerate"),
        _package("safetensors"),
        _package("huggingface_hub", "huggingface-hub"),
        _package("numpy"),
        _package("PIL", "pillow"),
        _package("tensorboard"),
        _package("tqdm"),
        _package("matplotlib"),
        _package("fvcore"),
        _package("sklearn", "scikit-learn"),
        _package("scipy"),
        _package("torch_fidelity", "torch-fidelity", extra="gen"),
        _package("gradio", extra="app"),
        _package("pycocotools", extra="det"),
        _package("detectron2"),
        _package("mmseg", "onedl-mmsegmentation", "mmsegmentation", extra="seg"),
        _package("mmcv", "onedl-mmcv", "mmcv", extra="seg"),
        _package("mmengine", "onedl-mmengine", "mmengine", extra="seg"),
        _package("onnx", extra="onnx"),
        _package("onnxscript", extra="onnx"),
        _package("onnxruntime", extra="onnx"),
    ]
)
CORE = (
    "torch",
    "torchvision",
    "timm",
    "accelerate",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "PIL",
    "tensorboard",
    "tqdm",
)
TASKS = {
    "pretrain": Task("pretrain", (*CORE, "matplotlib")),
    "gen": Task(
        "gen",
        (*CORE, "matplotlib"),
        {"torch_fidelity": "FID, IS, precision and recall", "gradio": "the page of addp app"},
    ),
    "cls": Task("cls", CORE),
    "det": Task("det", (*CORE, "pycocotools"), {"detectron2": "the paper's engine; engine=torchvision does without"}),
    "seg": Task("seg", (*CORE, "mmseg", "mmcv", "mmengine")),
    "export": Task("tools", CORE, dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "layout=onnx")),
    "throughput": Task("tools", (*CORE, "fvcore")),
    "toy": Task("tools", ("numpy", "PIL", "sklearn", "scipy")),
}
DETECTRON2 = (  # there is no release of it on the index
    f"{PIP} 'omegaconf<2.4' hydra-core shapely && "
    f"{PIP} --no-build-isolation --no-deps 'git+https://github.com/facebookresearch/detectron2' (builds for minutes)"
)

PROBE = """
import json
found = {"version": None, "cuda": None, "devices": [], "errors": {}}
try:
    import torch
    found["version"], found["cuda"] = torch.__version__, torch.version.cuda or torch.version.hip
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(i)
        gib = round(p.total_memory / 2**30, 1)
        found["devices"].append({"name": p.name, "gib": gib, "capability": f"{p.major}.{p.minor}"})
except Exception as error:
    found["errors"]["torch"] = f"{type(error).__name__}: {error}"
else:
    try:
        import torchvision
        torch.ops.torchvision.nms
    except Exception as error:
        found["errors"]["torchvision"] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


def run(recipe: Recipe) -> None:
    """Look around and write the findings to stdout."""
    report = examine(recipe.imports)
    sys.stdout.write(json.dumps(report, indent=2) + "\n" if recipe.json else as_text(report))


def examine(imports: bool = False) -> dict[str, Any]:
    """All findings; with `imports`, every optional package is imported as well."""
    versions = {module: installed_version(package) for module, package in PACKAGES.items()}
    torch = _python(PROBE) if versions["torch"] else {}
    found = (
        json.loads(torch["out"]) if torch.get("out") else {"version": None, "cuda": None, "devices": [], "errors": {}}
    )
    if torch and not torch.get("out"):
        found["errors"]["torch"] = torch["error"]
    errors: dict[str, str] = found.pop("errors")
    if imports:
        others = [module for module, version in versions.items() if version and module not in ("torch", "torchvision")]
        results = {module: _python(f"import {module}") for module in others}
        errors |= {module: result["error"] for module, result in results.items() if result["error"]}
    return {
        "addp": addp_core.__version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "torch": found,
        "machine": machine(),
        "packages": versions,
        "tasks": {name: _diagnose(task, versions, errors) for name, task in TASKS.items()},
        "problems": _problems(versions, errors, found),
    }


def machine() -> dict[str, Any]:
    """Cores this process may use, memory and free disk (GiB), and the C++ compiler that torch.compile would call."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    free = shutil.disk_usage(Path.cwd()).free
    return {"cores": cores, "memory_gib": _gib(memory), "free_disk_gib": _gib(free), "compiler": compiler}


def installed_version(package: Package) -> str | None:
    """The installed version, 'unknown' for a module without a distribution, None where there is no such module."""
    for name in package.distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown" if importlib.util.find_spec(package.module) else None


def command_for(module: str) -> str | None:
    """The command that installs the package imported as `module`; None for a package that is none of the suite's."""
    package = PACKAGES.get(module)
    if package is None:
        return None
    if module == "detectron2":
        return DETECTRON2
    if package.extra and _requirements():
        return f"{PIP} 'addp[{package.extra}]'"
    if package.extra:  # run from a source tree that is not installed
        return f"{PIP} -e '.[{package.extra}]'"
    return f"{PIP} '{_requirements().get(package.distributions[0], package.distributions[0])}'"


def _requirements() -> dict[str, str]:
    """What the installed `addp` asks for: distribution -> 'name<range>'; empty where it is not installed."""
    try:
        lines = importlib.metadata.requires("addp") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    parsed = map(Requirement, lines)
    return {r.name.lower().replace("_", "-"): f"{r.name}{r.specifier}" for r in parsed if r.name != "addp"}


def _diagnose(task: Task, versions: dict[str, str | None], errors: dict[str, str]) -> dict[str, Any]:
    lacks = [module for module in task.needs if not versions[module]]
    broken = [module for module in (*task.needs, *task.optional) if module in errors]
    more = {module: why for module, why in task.optional.items() if not versions[module]}
    return {
        "in_this_version": importlib.util.find_spec(task.folder) is not None,
        "ready": not lacks and not any(module in task.needs for module in broken),
        "lacks": lacks,
        "broken": broken,
        "more_with": more,
        "commands": list(dict.fromkeys(map(command_for, (*lacks, *more)))),
    }


def _problems(versions: dict[str, str | None], errors: dict[str, str], torch: dict[str, Any]) -> list[str]:
    """What is installed but does not work or was never tested, each with the way out."""
    problems = []
    requirements = _requirements()
    for module, error in errors.items():
        fix = command_for(module)
        if module == "torchvision" and "torchvision::nms" in error:
            pair = f"torch {versions['torch']}, torchvision {versions['torchvision']}"
            error += f" ({pair}: not built for each other)"
            fix = f"{PIP} --force-reinstall {_pair(requirements)} (both from the same index)"
        problems.append(f"{module} is installed but does not import: {' '.join(error.split())}; reinstall it: {fix}")
    for module, version in versions.items():
        wanted = requirements.get(PACKAGES[module].distributions[0])
        if wanted and version not in (None, "unknown") and not Requirement(wanted).specifier.contains(version, True):
            problems.append(f"{module} {version} is outside the tested range; the tested one: {command_for(module)}")
    if shutil.which("nvidia-smi") and torch["version"] and not torch["devices"]:
        build = f"built for CUDA {torch['cuda']}: the driver may be older" if torch["cuda"] else "built without CUDA"
        problems.append(f"nvidia-smi is here, but torch {torch['version']} sees no GPU; it is {build}")
    return problems


def _pair(requirements: dict[str, str]) -> str:
    return " ".join(f"'{requirements.get(name, name)}'" for name in ("torch", "torchvision"))


def _python(code: str) -> dict[str, str]:
    """Run `code` in a fresh interpreter: what it printed last, and the last line of its complaint if it failed."""
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=PROBE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"out": "", "error": f"no answer within {PROBE_SECONDS} s"}
    complaint = done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"]
    out = done.stdout.strip().splitlines() or [""]
    return {"out": "", "error": complaint[-1]} if done.returncode else {"out": out[-1], "error": ""}


def _gib(size: int) -> float:
    return round(size / 2**30, 1)


def as_text(report: dict[str, Any]) -> str:
    """The findings for people."""
    torch, box = report["torch"], report["machine"]
    devices = [f"{d['name']}, {d['gib']} GiB, compute capability {d['capability']}" for d in torch["devices"]]
    build = f"{torch['version']} (CUDA {torch['cuda']})" if torch["cuda"] else torch["version"] or "not usable"
    lines = [
        f"addp {report['addp']}, Python {report['python']} at {report['executable']}",
        f"torch       {build}",
        *(f"GPU {i}       {device}" for i, device in enumerate(devices)),
        *([] if devices else ["GPU         none: everything runs on the CPU"]),
        f"machine     {box['cores']} cores, {box['memory_gib']} GiB memory, {box['free_disk_gib']} GiB disk free here",
        f"compiler    {box['compiler'] or 'none: train.compile=true cannot work (install g++)'}",
        "",
        "packages",
        *(f"  {module:<16} {version or '-'}" for module, version in report["packages"].items()),
        "",
        "tasks",
    ]
    for name, task in report["tasks"].items():
        state = "ready" if task["ready"] else "not ready"
        state += "" if task["in_this_version"] else " (its packages; this version of addp does not have the task)"
        notes = [f"lacks {', '.join(task['lacks'])}"] if task["lacks"] else []
        notes += [f"broken: {', '.join(task['broken'])}"] if task["broken"] else []
        notes += [f"{module} would add {why}" for module, why in task["more_with"].items()]
        lines.append(f"  {name:<11} {'; '.join([state, *notes])}")
        lines += [f"              {command}" for command in task["commands"]]
    if report["problems"]:
        lines += ["", "problems", *(f"  {problem}" for problem in report["problems"])]
    return "\n".join(lines) + "\n"
