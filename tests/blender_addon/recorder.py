# SPDX-License-Identifier: GPL-3.0-or-later
"""A stand-in for Blender's layout that records what a panel draws, and refuses what Blender would refuse."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class Layout:
    """`texts`: all labels and progress texts. `buttons`: operator idnames. `props`: property names. `folding`: panels
    in the layout, which Blender leaves as they were first drawn or last folded."""

    def __init__(self, bpy: Any, root: Layout | None = None) -> None:
        top = root or self
        self._bpy, self._root = bpy, top
        if root is None:
            self.texts: list[str] = []
            self.buttons: list[str] = []
            self.props: list[str] = []
            self.icons: list[str] = []
            self.folding: list[str] = []
            self._known_icons = set(
                bpy.types.UILayout.bl_rna.functions["prop"].parameters["icon"].enum_items.keys())  # fmt: skip
        else:
            self.texts, self.buttons, self.props, self.icons = root.texts, root.buttons, root.props, root.icons
            self.folding = root.folding
            self._known_icons = root._known_icons

    def _inner(self, **_: Any) -> Layout:
        return Layout(self._bpy, self._root)

    row = column = box = split = grid_flow = _inner

    def panel(self, idname: str, default_closed: bool = False) -> tuple[Layout, Layout]:
        self._root.folding.append(idname)
        return self._inner(), self._inner()

    def separator(self) -> None: ...

    def label(self, text: str = "", icon: str = "NONE", translate: bool = True) -> None:
        assert isinstance(text, str)
        self.texts.append(text)
        self._icon(icon)

    def progress(self, factor: float = 0.0, text: str = "") -> None:
        assert 0.0 <= factor <= 1.0
        self.texts.append(text)

    def prop(self, data: Any, name: str, text: str | None = None, icon: str = "NONE", **_: Any) -> None:
        assert name in data.bl_rna.properties
        self.props.append(name)
        self._icon(icon)

    def template_icon(self, icon_value: int, scale: float = 1.0) -> None:
        assert icon_value > 0

    def operator(self, idname: str, text: str | None = None, icon: str = "NONE", emboss: bool = True,
                 depress: bool = False, translate: bool = True) -> Any:  # fmt: skip
        module, name = idname.split(".")
        rna = getattr(getattr(self._bpy.ops, module), name).get_rna_type()  # raises for an unknown operator
        self.buttons.append(idname)
        if text:
            self.texts.append(text)
        self._icon(icon)
        return SimpleNamespace(**{p.identifier: None for p in rna.properties})

    def operator_menu_enum(self, idname: str, prop: str, text: str | None = None, icon: str = "NONE") -> Any:
        self.operator(idname, text, icon)

    def _icon(self, icon: str) -> None:
        assert icon in self._known_icons, icon
        self.icons.append(icon)
