"""Imports of large libraries by the command line: without passes of the garbage collector, and
without packages that other libraries import and most runs never use.
"""

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader
from threading import RLock
from types import ModuleType
from typing import Any

from sd_lora.errors import RunError

LATER = ("bitsandbytes", "scipy.stats")
"""Modules that wait for their first use.

diffusers imports both by `import`, for a base that bitsandbytes has quantised and for sigmas of a
beta distribution, and asks for none of their names meanwhile. Of the 4.4 s of CPU time from the
command to the first step, bitsandbytes took 0.48, for it imports torch's compiler, and scipy.stats
0.10 (diffusers 0.42, bitsandbytes 0.50, scipy 1.17, torch 2.13). Modules whose names are imported,
as `from peft.helpers import …` is, cannot wait.
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
        yield
        gc.freeze()
    finally:
        gc.enable()


def let_wait(names: Sequence[str]) -> None:
    """Let an `import` of one of these modules wait until a name of it is asked for.

    It is there until then as a `Waiting`; from then on as itself.

    names: of modules; those that are loaded or not installed are left alone.
    """
    if not any(isinstance(finder, _Parts) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Parts())
    for name in names:
        if name not in sys.modules and (spec := _spec_of(name)):
            sys.modules[name] = Waiting(name, spec)
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
    """A stand-in for a module, which it imports once it is asked for a name; it then answers as
    that does.

    Raises:
        BrokenPackage: the import fails.
    """

    def __init__(self, name: str, spec: ModuleSpec) -> None:
        super().__init__(name)
        # asked of all modules by `find_spec` and by `inspect.getmodule`, and so no use of this one
        self.__spec__, self.__file__ = spec, spec.origin

    def __getattr__(self, name: str) -> Any:
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
        return getattr(import_module(self.__name__), name)


class _Parts(MetaPathFinder):
    """A finder of modules that are there already.

    `import a.b` asks the stand-in of a for its `__path__`; the import of a, which that is, may
    bring a.b with it, and Python, which has looked before, would run its code again.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        there = sys.modules.get(name)
        if there is None or target is not None:  # a target is reloaded
            return None
        return spec_from_loader(name, _There(there))


class _There(Loader):
    """A loader of a module that is loaded already, and stays as it is."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec
