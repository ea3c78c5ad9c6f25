"""DK-DETR: open-vocabulary detection by distilling visual-linguistic knowledge into DETR.

`from dkdetr import DKDETR` gives the student as an object to call; nothing is imported before that.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dkdetr.inference.predict import DKDETR

__all__ = ["DKDETR"]


def __getattr__(name: str) -> Any:
    if name == "DKDETR":
        from dkdetr.inference.predict import DKDETR

        return DKDETR
    raise AttributeError(name)
