import inspect
import subprocess
import sys

import pytest

import interpolate
from tests.mutants import MUTANTS, ROOT

HEAVY = "torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch.export"


def test_importing_the_library_loads_little_beyond_torch():
    """A time would depend on the machine; what is loaded does not."""
    script = "import sys, torch; before = {*sys.modules}; import interpolate; print(*({*sys.modules} - before))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    packages = {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names
    assert packages == {"interpolate", "fsspec", "torch"}
    assert not [name for name in loaded if name.startswith(HEAVY)]
    assert not {"interpolate.lightning", "interpolate.transformers", "interpolate.__main__"} & {*loaded}


@pytest.mark.parametrize("name", [name for name in interpolate.__all__ if not name.endswith("Error")])
def test_every_public_name_has_an_example(name: str):
    public = getattr(interpolate, name)
    if not inspect.isabstract(public):
        assert ">>>" in (inspect.getdoc(public) or "")


def test_public_names_are_sorted_and_exist():
    assert interpolate.__all__ == sorted(interpolate.__all__)
    assert all(hasattr(interpolate, name) for name in interpolate.__all__)


def test_every_mutant_breaks_a_line_that_is_there():
    source = {file: (ROOT / "interpolate" / file).read_text(encoding="utf-8") for file in {m[0] for m in MUTANTS}}
    assert not [(file, line) for file, line, *_ in MUTANTS if line not in source[file]]
