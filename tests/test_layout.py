"""The house keeps its shape: small files and functions, cheap imports, an exact public list."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import sd_lora

FILES = sorted(Path(sd_lora.__file__).parent.rglob("*.py"))
MAX_FILE, MAX_FUNCTION = 420, 75
"""Lines. A budget is raised only in the change that needs it, with its reason."""


def test_files_and_functions_stay_small() -> None:
    """No file and no function outgrows what one reads in one sitting."""
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= MAX_FILE, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                size = (node.end_lineno or 0) - node.lineno + 1
                assert size <= MAX_FUNCTION, f"{path}: {node.name} has {size} lines"


def docstrings(tree: ast.Module) -> list[str]:
    """All docstrings of a module: its own, and those of classes and functions."""
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef)
    return [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, nodes)]


def test_docstrings_say_the_thing_itself() -> None:
    """The word "what" stands at most twice in 1,000 docstring words: the thing is named."""
    words: list[str] = []
    for path in FILES:
        for text in docstrings(ast.parse(path.read_text(encoding="utf-8"))):
            words += re.findall(r"[a-z]+", text.lower())
    assert len(words) > 20_000
    assert 1000 * words.count("what") / len(words) <= 2


def test_only_the_front_door_prints() -> None:
    """`print` is called in the commands, the demo and the terminal alone."""
    printing = {
        path.name
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    }
    assert printing == {"cli.py", "commands.py", "demo.py", "judging.py", "terminal.py"}


POSIX_ONLY = {
    "os": "chown chroot ctermid fchmod fchown fork forkpty getegid geteuid getgid getgroups "
    "getloadavg getpgid getpgrp getpriority getuid initgroups killpg lchown link mkfifo mknod nice "
    "openpty pathconf posix_fadvise posix_fallocate posix_spawn pread preadv pwrite pwritev "
    "sched_getaffinity sched_setaffinity sched_yield sendfile setegid seteuid setgid setpgid "
    "setpriority setsid setuid statvfs sync tcgetpgrp ttyname uname wait wait3 wait4 O_CLOEXEC "
    "O_DIRECTORY O_NOFOLLOW O_NONBLOCK O_SYNC WNOHANG",
    "signal": "SIGALRM SIGCHLD SIGCONT SIGHUP SIGKILL SIGQUIT SIGSTOP SIGTSTP SIGUSR1 SIGUSR2 "
    "alarm pause pthread_kill pthread_sigmask setitimer sigwait",
}
POSIX_MODULES = {"crypt", "fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios"}
POSIX_MODULES |= {"tty"}


def test_calls_of_one_system_are_guarded() -> None:
    """Names that Windows lacks are used behind a `hasattr` or `getattr` in the same expression, and
    modules that it lacks not at all."""
    for path in FILES:
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {getattr(node, "module", None)} | {alias.name for alias in node.names}
                assert names.isdisjoint(POSIX_MODULES), path
            if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)):
                continue
            if node.attr in POSIX_ONLY.get(node.value.id, "").split():
                line = source.splitlines()[node.lineno - 1]
                assert f'hasattr({node.value.id}, "{node.attr}")' in line, (path, line)


def test_the_loop_is_flat() -> None:
    """Blocks in the training loop's file are at most three deep."""
    blocks = (ast.For, ast.While, ast.If, ast.With, ast.Try)

    def depth(node: ast.AST) -> int:
        inner = max((depth(child) for child in ast.iter_child_nodes(node)), default=0)
        return inner + isinstance(node, blocks)

    (loop,) = (path for path in FILES if path.name == "loop.py")
    tree = ast.parse(loop.read_text(encoding="utf-8"))
    assert {
        n.name: d for n in tree.body if isinstance(n, ast.FunctionDef) and (d := depth(n)) > 3
    } == {}


def test_public_names_exist_and_are_listed() -> None:
    """Every public name resolves, and `__all__`, the lazy table and `dir` agree."""
    assert sorted(sd_lora._HOME) == sorted(sd_lora.__all__) == list(sd_lora.__all__)
    assert all(getattr(sd_lora, name).__name__ == name for name in sd_lora.__all__)
    assert set(sd_lora.__all__) <= set(dir(sd_lora))


def test_public_callables_have_docstrings() -> None:
    """Everything public says what it does."""
    assert all(getattr(sd_lora, name).__doc__ for name in sd_lora.__all__)


def test_importing_is_cheap() -> None:
    """`import sd_lora`, parsing flags and the studio load neither torch nor diffusers nor
    transformers."""
    code = (
        "import sys, sd_lora; from sd_lora.config import command_line; import sd_lora.studio.app; "
        "print([m for m in ('torch', 'diffusers', 'transformers', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_tools_load_no_pipeline_library(tmp_path: Path) -> None:
    """`inspect` and `convert` read, check and write a LoRA file without diffusers, transformers,
    peft and accelerate, which take three times as long to import as all the rest. diffusers is
    needed where it verifies a written file."""
    file, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_"
    factors = {f"{name}A.weight": torch.ones(2, 1280), f"{name}B.weight": torch.ones(1280, 2)}
    save_file(factors, file)
    code = (
        "import sys; from sd_lora.cli import main\n"
        f"assert main(['inspect', {str(file)!r}]) == 0\n"
        f"assert main(['convert', {str(file)!r}, '--family', 'sd1', '--to', 'kohya',"
        f" '--no_verify', '--out', {str(out)!r}]) == 0\n"
        "heavy = ('diffusers', 'transformers', 'peft', 'accelerate')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert len(load_file(out)) == 3


def test_changelog_knows_the_version(root: Path) -> None:
    """The newest version in CHANGELOG.md is the package's."""
    heading = f"## [{sd_lora.__version__}]"
    assert heading in (root / "CHANGELOG.md").read_text(encoding="utf-8")
