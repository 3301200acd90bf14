"""`addp doctor`: what is installed, what each task lacks, and the command that installs it; with `check=true`, whether
this machine computes what it should (tools/selfcheck).

What `addp` requires is read from the package's own metadata. torch is imported in a separate process, so that a broken
installation is reported instead of crashing the command. The exit code is 0 whatever is found, unless a check fails.
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
from typing import Annotated, Any, Literal

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from annotated_types import Gt
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import addp_core
from addp_core.base.cpu import usable_cores
from tools.selfcheck.check import check
from tools.selfcheck.checks import CheckName

PIP = f"{shlex.quote(sys.executable)} -m pip install"
PROBE_SECONDS = 180


@dataclass
class Recipe:
    """Keys of `addp doctor`."""

    json: Annotated[bool, "print JSON instead of text"] = False
    imports: Annotated[
        bool, "import every package too, which is slower and also finds packages that are installed but broken"
    ] = False
    check: Annotated[
        bool,
        "compute on this machine for some minutes: are numbers right, do runs continue, how fast is it",
    ] = False
    checks: Annotated[list[CheckName], "checks to run, as in checks=[parity,resume]; all by default"] = field(
        default_factory=list
    )
    device: Annotated[Literal["", "cpu", "cuda"], "where to check; empty: a GPU if there is one"] = ""
    seconds: Annotated[float, Gt(0), "for all checks; those that would take longer are skipped"] = 600.0
    out: Annotated[str, "file for what the checks found, versions and hardware, as JSON"] = "addp-check.json"

    def __post_init__(self):
        if self.check:
            return
        for name in ("checks", "device"):
            if getattr(self, name):
                raise ValueError(f"{name}: found {getattr(self, name)} without check=true; add it")


# -------------------- what addp requires


@dataclass(frozen=True)
class Package:
    """A package: its import name, the distributions that provide it, and the extra of `addp` that requires it."""

    module: str
    distributions: tuple[str, ...]
    extra: str = ""


MODULES = {  # distribution: import name, where it is not the distribution's with underscores
    "pillow": "PIL",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
    "onedl-mmsegmentation": "mmseg",
    "onedl-mmcv": "mmcv",
    "onedl-mmengine": "mmengine",
}
ALTERNATIVES = {"mmseg": ("mmsegmentation",), "mmcv": ("mmcv",), "mmengine": ("mmengine",)}  # OpenMMLab's own
DEVELOPMENT = ("test", "docs")  # extras that no task needs
TRACKERS = {name: f"train.trackers=[{name}]" for name in ("wandb", "mlflow", "trackio")}
DETECTRON2 = (  # there is no release of it on the index; its model_zoo needs pkg_resources, which setuptools 81 removed
    f"{PIP} 'omegaconf<2.4' hydra-core shapely 'setuptools<81' && "
    f"{PIP} --no-build-isolation --no-deps 'git+https://github.com/facebookresearch/detectron2' (builds for minutes)"
)


def declared_requirements() -> list[Requirement]:
    """Return the requirements of `addp` with their extras, from the pyproject.toml of a source tree, whose metadata may
    be older, or else from its metadata.
    """
    lines = _lines_of_pyproject() or importlib.metadata.requires("addp") or []
    return [requirement for requirement in map(Requirement, lines) if requirement.name != "addp"]


def _lines_of_pyproject() -> list[str]:
    path = Path(addp_core.__file__).parents[1] / "pyproject.toml"
    if not path.is_file():
        return []
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    return project["dependencies"] + [f"{line}; extra == '{name}'" for name, lines in extras.items() for line in lines]


def _packages() -> dict[str, Package]:
    """Return all packages that `addp` uses, by import name."""
    packages = {}
    for requirement in declared_requirements():
        extra = _extra_of(requirement)
        if extra in DEVELOPMENT or (requirement.marker and not requirement.marker.evaluate({"extra": extra})):
            continue
        name = canonicalize_name(requirement.name)
        module = MODULES.get(name, name.replace("-", "_"))
        packages[module] = Package(module, (name, *ALTERNATIVES.get(module, ())), extra)
    return packages | {"detectron2": Package("detectron2", ("detectron2",))}


def _extra_of(requirement: Requirement) -> str:
    """Return the extra that the requirement belongs to, "" if it is always required."""
    marker = str(requirement.marker or "")
    return marker.partition("extra == ")[2].strip("\"' ") if "extra == " in marker else ""


PACKAGES = _packages()


def modules_of(extra: str) -> tuple[str, ...]:
    """Return the import names of the packages that an extra requires; "" stands for those always required."""
    return tuple(p.module for p in PACKAGES.values() if p.extra == extra and p.module != "detectron2")


@dataclass(frozen=True)
class Task:
    """What a task needs, and what optional packages add to it."""

    folder: str
    needs: tuple[str, ...]  # import names
    optional: dict[str, str] = field(default_factory=dict)  # import name: what it adds


REQUIRED = modules_of("")
TASKS = {
    "pretrain": Task("pretrain", REQUIRED, TRACKERS),
    "gen": Task("gen", REQUIRED, {"torch_fidelity": "FID, IS, precision and recall", "gradio": "the page of addp app"}),
    "cls": Task("cls", REQUIRED),
    "det": Task(
        "det",
        (*REQUIRED, *modules_of("det")),
        {"detectron2": "the paper's engine; engine=torchvision works without it"},
    ),
    "seg": Task("seg", (*REQUIRED, *modules_of("seg"))),
    "export": Task("tools", REQUIRED, dict.fromkeys(modules_of("onnx"), "layout=onnx")),
    "throughput": Task("tools", REQUIRED),
    "toy": Task("tools", REQUIRED),
}

# -------------------- looking

PROBE = """
import json
found = {"version": None, "cuda": None, "devices": [], "mps": False, "errors": {}}
try:
    import torch
    found["version"], found["cuda"] = torch.__version__, torch.version.cuda or torch.version.hip
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(i)
        gib = round(p.total_memory / 2**30, 1)
        found["devices"].append({"name": p.name, "gib": gib, "capability": f"{p.major}.{p.minor}"})
    found["mps"] = torch.backends.mps.is_available()
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
    """Examine the environment and print the report, or check it."""
    report = examine(recipe.imports)
    if recipe.check:
        check(recipe.checks, recipe.device, recipe.seconds, report, Path(recipe.out), recipe.json)
        return
    sys.stdout.write(json.dumps(report, indent=2) + "\n" if recipe.json else as_text(report))


def examine(imports: bool = False) -> dict[str, Any]:
    """Return the whole report; with `imports`, every package is imported as well."""
    versions = {module: installed_version(package) for module, package in PACKAGES.items()}
    torch: dict[str, Any] = {"version": None, "cuda": None, "devices": [], "mps": False, "errors": {}}
    if versions["torch"]:
        output, error = _run_python(PROBE)
        torch = json.loads(output) if output else torch | {"errors": {"torch": error}}
    errors: dict[str, str] = torch.pop("errors")
    if imports:
        others = [module for module, version in versions.items() if version and module not in ("torch", "torchvision")]
        results = {module: _run_python(f"import {module}") for module in others}
        errors |= {module: error for module, (_, error) in results.items() if error}
    return {
        "addp": addp_core.__version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "torch": torch,
        "machine": machine(),
        "packages": versions,
        "tasks": {name: _diagnose(task, versions, errors) for name, task in TASKS.items()},
        "problems": _problems(versions, errors, torch),
    }


def machine() -> dict[str, Any]:
    """Return the cores this process may use, memory and free disk in GiB, and torch.compile's C++ compiler."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    free = shutil.disk_usage(Path.cwd()).free
    return {"cores": usable_cores(), "memory_gib": _gib(memory), "free_disk_gib": _gib(free), "compiler": compiler}


def installed_version(package: Package) -> str | None:
    """Return the installed version, "unknown" for a module without a distribution, None if there is no such module."""
    for name in package.distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown" if importlib.util.find_spec(package.module) else None


def command_for(module: str) -> str | None:
    """Return the command that installs the package imported as `module`, None if `addp` does not use it."""
    package = PACKAGES.get(module)
    if package is None:
        return None
    if module == "detectron2":
        return DETECTRON2
    if package.extra and _requirements():
        return f"{PIP} 'addp[{package.extra}]'"
    if package.extra:  # `addp` runs from a source tree and is not installed
        return f"{PIP} -e '.[{package.extra}]'"
    return f"{PIP} '{_requirements().get(package.distributions[0], package.distributions[0])}'"


def _requirements() -> dict[str, str]:
    """Return what the installed `addp` requires: distribution -> "name<range>"; empty if it is not installed."""
    if not _is_installed():
        return {}
    return {canonicalize_name(r.name): f"{r.name}{r.specifier}" for r in declared_requirements()}


def _is_installed() -> bool:
    try:
        importlib.metadata.distribution("addp")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


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
    """Return what is installed but does not work or was never tested, each with the remedy."""
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
            problems.append(f"{module} {version} was never tested, expected {wanted}: {command_for(module)}")
    if shutil.which("nvidia-smi") and torch["version"] and not torch["devices"]:
        build = f"built for CUDA {torch['cuda']}: the driver may be older" if torch["cuda"] else "built without CUDA"
        problems.append(f"nvidia-smi is here, but torch {torch['version']} sees no GPU; it is {build}")
    return problems


def _pair(requirements: dict[str, str]) -> str:
    return " ".join(f"'{requirements.get(name, name)}'" for name in ("torch", "torchvision"))


def _run_python(code: str) -> tuple[str, str]:
    """Run `code` in a new interpreter; return the last line it printed, and the last line of its error if it failed."""
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=PROBE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return "", f"no answer within {PROBE_SECONDS} s"
    if done.returncode:
        return "", (done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"])[-1]
    return (done.stdout.strip().splitlines() or [""])[-1], ""


def _gib(size: int) -> float:
    return round(size / 2**30, 1)


def as_text(report: dict[str, Any]) -> str:
    """Return the report as text for a terminal."""
    torch, host = report["torch"], report["machine"]
    devices = [f"{d['name']}, {d['gib']} GiB, compute capability {d['capability']}" for d in torch["devices"]]
    no_cuda = "Apple's (mps)" if torch["mps"] else "none: everything runs on the CPU"
    build = f"{torch['version']} (CUDA {torch['cuda']})" if torch["cuda"] else torch["version"] or "not usable"
    lines = [
        f"addp {report['addp']}, Python {report['python']} at {report['executable']}",
        f"torch       {build}",
        *(f"GPU {i}       {device}" for i, device in enumerate(devices)),
        *([] if devices else [f"GPU         {no_cuda}"]),
        f"machine     {host['cores']} cores, {host['memory_gib']} GiB memory, {host['free_disk_gib']} GiB free disk",
        f"compiler    {host['compiler'] or 'none: train.compile=true cannot work (install g++)'}",
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
