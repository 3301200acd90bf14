"""What may lie beside the tensors of a PyTorch checkpoint: values without code, which are read as placeholders.

`torch.load(weights_only=True)` refuses every class that is not on its list. Those listed here are common in training
checkpoints and replaced by inert objects: nothing of numpy, pathlib, omegaconf or mmengine runs. Every other class is
refused.
"""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

INERT = (  # read, and forgotten
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
    *(
        f"pathlib{module}.{name}"
        for module in ("", "._local")
        for name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
    ),
    "datetime.datetime",
    "datetime.timedelta",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.nodes.AnyNode",
    "typing.Any",
    "mmengine.logging.history_buffer.HistoryBuffer",
    *(f"builtins.{name}" for name in ("int", "float", "bool", "str", "list", "dict", "tuple")),  # factories
)
MAPPINGS = (  # read as a dict
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "mmengine.config.config.ConfigDict",
)
NAMESPACES = ("argparse.Namespace", "types.SimpleNamespace")  # read with their attributes: the options of a training


class Inert:
    """A placeholder of a value that nobody reads."""

    def __new__(cls, *_: Any, **__: Any) -> "Inert":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def _empty_mapping(*_: Any) -> dict[Any, Any]:
    """Stand for `defaultdict(factory)`, which is filled afterwards."""
    return {}


def _inert_attribute(*_: Any) -> Inert:
    """Stand for `getattr(class, name)`, by which methods are pickled (mmengine's histories), without looking it up."""
    return Inert()


HARMLESS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [  # for torch.serialization.safe_globals
    *((Inert, name) for name in INERT),
    *((dict, name) for name in MAPPINGS),
    *((Namespace, name) for name in NAMESPACES),
    (_empty_mapping, "collections.defaultdict"),
    (_inert_attribute, "builtins.getattr"),
]
