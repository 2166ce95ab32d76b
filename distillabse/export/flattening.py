"""One row for each token: [batch, tokens, width] becomes [batch * tokens, width] from the first layer to the last.

INT8 that gives every token its own scale needs rows. Reshaping around each product costs more than a tenth of the time
of a short text; reshaping once costs nothing. The attention keeps its four axes, and pooling its three.
"""

from __future__ import annotations

from typing import Any

from distillabse.export.editing import GraphEditor

# On rows as on the whole tensor; LayerNormalization and MatMul work along the last axis.
_ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Erf", "Gelu", "Tanh", "Relu", "Cast", "Clip", "Sqrt", "Sigmoid"})


def flatten_tokens(model: Any) -> None:
    """Rewrite an encoder's graph so that its layers work on rows; all it computes stays the same."""
    _Flattening(model).run()


class _Flattening:
    def __init__(self, model: Any) -> None:
        self.edit = GraphEditor(model)
        self.outputs = {value.name for value in model.graph.output}
        self.rows: dict[str, str] = {}
        self.widths: dict[str, int] = {}

    def run(self) -> None:
        for node in list(self.edit.graph.node):
            if not self._on_rows(node):
                self.edit.keep(node, {name: self._read_whole(node, name) for name in node.input if name in self.rows})
        for name in self.outputs & self.rows.keys():
            self._restore(name)
        self.edit.finish()

    def _on_rows(self, node: Any) -> bool:
        """Add the node in its form for rows, if it has one."""
        edit, first = self.edit, node.input[0] if node.input else ""
        if node.op_type == "LayerNormalization" and edit.is_constant(node.input[1]):
            if first not in self.rows:  # the embeddings', and what follows a sparse layer, which gives three axes
                self._flatten(first, edit.shape(node.input[1])[0])
            return self._keep(node, self.widths[first])
        if node.op_type == "MatMul" and edit.is_constant(node.input[1]) and len(edit.shape(node.input[1])) == 2:
            if first not in self.rows:
                if not self._is_context(first):
                    return False
                self._flatten(edit.made_by[first].input[0], edit.shape(node.input[1])[0], first)
            return self._keep(node, edit.shape(node.input[1])[1])
        if node.op_type in _ELEMENTWISE and any(name in self.rows for name in node.input):
            if all(name in self.rows or self._is_small(name) for name in node.input if name):
                return self._keep(node, next(self.widths[name] for name in node.input if name in self.rows))
        return False

    def _keep(self, node: Any, width: int) -> bool:
        output = node.output[0]
        # An output of the graph keeps its name for what it is as a whole.
        self.rows[output] = f"{output}_rows" if output in self.outputs else output
        self.widths[output] = width
        self.edit.keep(node, self.rows, self.rows[output])
        return True

    def _read_whole(self, node: Any, name: str) -> str:
        """What a node reads that does not work on rows."""
        # To reshape rows into heads is to reshape the tensor: its shape is given in full.
        return self.rows[name] if self._names_all_axes(node) else self._restore(name)

    def _flatten(self, source: str, width: int, name: str | None = None) -> None:
        shape = self.edit.integers("rows_of", [-1, width])
        self.rows[name or source] = self.edit.add("Reshape", [source, shape])
        self.widths[name or source] = width

    def _restore(self, name: str) -> str:
        """Name of the tensor with its three axes again."""
        whole = name if name in self.outputs else f"{name}_whole"
        if not self.edit.has(whole):
            if not self.edit.has("leading_axes"):
                self.edit.add("Shape", ["input_ids"], "leading_axes")
            width = self.edit.integers("width", [self.widths[name]])
            shape = self.edit.add("Concat", ["leading_axes", width], axis=0)
            self.edit.add("Reshape", [self.rows[name], shape], whole)
        return whole

    def _is_context(self, name: str) -> bool:
        """Whether a tensor is put together from heads: a reshape to [batch, tokens, width]."""
        maker = self.edit.made_by.get(name)
        if maker is None or maker.op_type != "Reshape":
            return False
        shape = self.edit.made_by.get(maker.input[1])
        return shape is not None and shape.op_type == "Concat" and len(shape.input) == 3

    def _names_all_axes(self, node: Any) -> bool:
        shape = self.edit.made_by.get(node.input[1]) if node.op_type == "Reshape" else None
        return shape is not None and shape.op_type == "Concat"

    def _is_small(self, name: str) -> bool:
        return self.edit.is_constant(name) and len(self.edit.shape(name)) <= 1
