"""Imports of large libraries by the command line: without passes of the garbage collector, and
without packages that other libraries import and most runs never use.
"""

import gc
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader
from pathlib import Path
from threading import RLock
from types import ModuleType
from typing import Any

from sd_lora.errors import RunError

LATER: dict[str, tuple[str, ...]] = {
    "bitsandbytes": (),
    "scipy.stats": (),
    "scipy.integrate": (),
    "scipy.optimize": ("linear_sum_assignment",),
}
"""Modules that wait for their first use → their functions that other libraries import by name.

diffusers imports the first three by `import`, for a base that bitsandbytes has quantised, sigmas of
a beta distribution and one scheduler, and asks for none of their names meanwhile; transformers
imports the last one's function, for a loss of object detection. Of the 4.4 s of CPU time from the
command to the first step, bitsandbytes took 0.48, for it imports torch's compiler, scipy.stats 0.10
and scipy.optimize 0.16 (diffusers 0.42, transformers 5.23, bitsandbytes 0.50, scipy 1.17, torch
2.13).
Modules whose classes are imported by name, as `from torchao.quantization import FqnToConfig` is,
cannot wait: who has the class may ask what is one.
"""


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import large libraries without the collector of reference cycles, keep their objects out of
    its later passes, and let `LATER` wait.

    5,000 modules make a million objects that live as long as the process. Passes over them took 1.3
    of 6.1 s (torch 2.13, diffusers 0.42), and each one later in the run would walk them again.
    """
    if "torch" in sys.modules or not gc.isenabled():  # loaded already, or somebody's choice
        yield
        return
    gc.disable()
    try:
        let_wait(LATER)
        read_models_once()
        yield
        gc.freeze()
    finally:
        gc.enable()


def read_models_once() -> None:
    """Let transformers look for names in the files of its models once.

    It does so for itself and for `transformers.models`, 0.20 s each time, and its cache (128
    entries in 5.23) is too small for its 550 folders. The whole, asked for last, is still there.
    """
    utils = import_module("transformers.utils.import_utils")
    read = getattr(utils, "create_import_structure_from_path", None)
    if read is None or utils.__file__ is None:
        return
    models = Path(utils.__file__).parent.parent / "models"

    def once(path: Any) -> Any:
        return read(models if Path(path) == models / "__init__.py" else path)

    utils.create_import_structure_from_path = once  # type: ignore[attr-defined]


def let_wait(names: Mapping[str, Sequence[str]]) -> None:
    """Let an `import` of one of these modules wait until a name of it is asked for, or a function.

    It is there until then as a `Waiting`; from then on as itself.

    names: of modules → of functions of each that wait, too, until they are called; modules that are
    loaded or not installed are left alone.
    """
    if not any(isinstance(finder, _Parts) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Parts())
    for name, functions in names.items():
        if name not in sys.modules and (spec := _spec_of(name)):
            sys.modules[name] = Waiting(name, spec, functions)
            parent, _, own = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], own, sys.modules[name])


def _spec_of(name: str) -> ModuleSpec | None:
    """Where a module is; None if it, or a package that it is in, is not installed."""
    try:
        return find_spec(name)
    except ModuleNotFoundError:
        return None


_WAKING = RLock()


class BrokenPackage(RunError, ImportError):
    """A package that is installed and cannot be imported: for people, and for libraries that go on
    without it."""


class Waiting(ModuleType):
    """A stand-in for a module, which it imports once it is asked for a name, or once one of its
    functions is called; it then answers as that does.

    functions: names for which a function is given meanwhile that calls the module's own.

    Raises:
        BrokenPackage: the import fails.
    """

    def __init__(self, name: str, spec: ModuleSpec, functions: Sequence[str]) -> None:
        super().__init__(name)
        self._functions = functions
        # asked of all modules by `find_spec` and by `inspect.getmodule`, and so no use of this one
        self.__spec__, self.__file__ = spec, spec.origin
        if spec.submodule_search_locations is not None:  # `from … import` asks a package for it
            self.__path__ = spec.submodule_search_locations

    def __getattr__(self, name: str) -> Any:
        if name in self._functions and sys.modules.get(self.__name__) is self:
            return lambda *args, **kwargs: getattr(self.wake(), name)(*args, **kwargs)
        return getattr(self.wake(), name)

    def wake(self) -> ModuleType:
        """Import the module itself."""
        with _WAKING:  # a second thread would take away what the first one imports
            if sys.modules.get(self.__name__) is self:
                del sys.modules[self.__name__]
                try:
                    import_module(self.__name__)
                except Exception as error:  # as many as there are broken packages
                    sys.modules[self.__name__] = self
                    raise BrokenPackage(
                        f"{self.__name__} is installed, and its import fails: "
                        f"{type(error).__name__}: {error}. Install a version of it for this "
                        "torch, or uninstall it; a run's steps are in its checkpoints"
                    ) from error
        return import_module(self.__name__)


class _Parts(MetaPathFinder):
    """A finder that imports a waiting package before a part of it.

    The package's own code may bring the part with it, and Python, which has looked before, would
    run the part's code again.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package = sys.modules.get(name.rpartition(".")[0])
        if isinstance(package, Waiting):
            package.wake()
        there = sys.modules.get(name)
        if there is None or target is not None:  # a target is reloaded
            return None
        spec = spec_from_loader(name, _There(there))
        there.__spec__ = spec  # Python takes a new module's own, and runs its code
        return spec


class _There(Loader):
    """A loader of a module that is loaded already, and stays as it is."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec
