"""What `make test` installs is what constraints.txt pins, and it works on a machine without a GPU."""

import re
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.markers import Marker

import infctx

from places import ROOT

PINS = [line.partition(";") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("pin", [pin for pin, _, marker in PINS if not marker or Marker(marker).evaluate()])
def test_pins(pin):
    name, _, wanted = pin.strip().partition("==")
    assert version(name).partition("+")[0] == wanted


def test_importing_infctx_loads_nothing_heavy():
    heavy = ("torch", "numba", "numpy", "deepspeed", "huggingface_hub")
    program = f"import sys, infctx, infctx.__main__; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_deepspeed_imports_on_a_cpu():
    program = "import os; os.environ['DS_ACCELERATOR'] = 'cpu'; import deepspeed; print(deepspeed.__version__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1].startswith(version("deepspeed"))


def test_pytest_does_not_read_the_id_that_xdist_writes(request):
    """If this fails, xdist's --dist loadgroup may work again and replace the scheduling in tests/conftest.py."""
    assert not hasattr(request.node, "_nodeid")


def test_type_checkers_find_an_editable_install():
    """They follow a path in a .pth, and no import hook."""
    (file,) = Path(sysconfig.get_path("purelib")).glob("__editable__.infctx-*.pth")
    assert (Path(file.read_text().strip()) / "infctx" / "py.typed").is_file()


def test_every_public_name_is_there():
    for name in infctx.__all__:
        assert callable(getattr(infctx, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        infctx.nothing  # noqa: B018
    assert re.fullmatch(r"\d+\.\d+\.\d+", infctx.__version__)
