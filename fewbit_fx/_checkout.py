"""In a checkout the passes lie beside this package; installed, they are a part of it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def find_passes(package: Path = Path(__file__).parent) -> None:
    """Let ``fewbit_fx.passes`` be imported wherever this package lies.

    A folder named fewbit_fx in the working directory comes before an installed package. In a clone it would
    find no passes, or those of another clone.

    Args:
        package: The folder of this package.

    Raises:
        ImportError: There are no passes; the message says what to do.
    """
    name = f"{__package__}.passes"
    beside = package.parent / "passes" / "__init__.py"
    if (package / "passes").is_dir() or name in sys.modules:
        return
    if beside.is_file():
        spec = importlib.util.spec_from_file_location(name, beside, submodule_search_locations=[str(beside.parent)])
        assert spec is not None, "a path that ends in .py has a spec"
        assert spec.loader is not None, "and a loader"
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        setattr(sys.modules[str(__package__)], "passes", module)  # noqa: B010  (an attribute that type checkers do not know of)
    elif importlib.util.find_spec(name) is None:
        raise ImportError(
            f"the folder {package} is not all of fewbit-fx: {name} is neither in it nor in {beside.parent}. "
            f"Copy the whole checkout, or install it by `pip install .` and run Python in another folder"
        )
