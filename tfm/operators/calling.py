"""How operators are called: by their namespace in torch, or by the steps that a call of the same kind has left.

A step is a function of an operator's call. csrc's is the operator itself; Triton's a plan of launches, where there is
one (kernels/plan.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tfm.operators.declaration import OPERATORS, Operator
from tfm.operators.kinds import Kind, Kinds, are_plain, precision_of
from tfm.operators.watching import is_watched
from tfm.taping import here

Step = Callable[[Any], Any]
# By namespace: runs an operator's call and returns the step for others like it, and the results.
recorders: dict[str, Callable[[Operator, Any], tuple[Step, Any]]] = {}
# The operators as torch calls them, by namespace and name: one look-up instead of three.
_found: dict[tuple[str, str], Callable] = {}
MOST_BACKWARDS = 64


def run(namespace: str, call: Any) -> Any:
    """Runs the operator of `call` in the namespace of one backend."""
    if namespace.__class__ is Steps:
        return namespace.run(call)
    if torch.compiler.is_compiling():  # Dynamo would guard on all that is in there
        return getattr(getattr(torch.ops, namespace), call.operator).default(*call)
    if here.tape is not None:
        return here.tape.run(namespace, call)
    here.operators += 1
    return function_of(namespace, call.operator)(*call)


def function_of(namespace: str, name: str) -> Callable:
    """Returns an operator as torch calls it."""
    function = _found.get((namespace, name))
    if function is None:
        function = getattr(getattr(torch.ops, namespace), name).default
        if OPERATORS[name].changes:
            function = _telling_of_changes(function, OPERATORS[name])
        _found[namespace, name] = function
    return function


def _telling_of_changes(function: Callable, item: Operator) -> Callable:
    """Returns an operator that tells autograd what it writes into, which torch does for operators of its own alone."""

    def call(*arguments: Any) -> Any:
        results = function(*arguments)
        _tell_of_changes(arguments, item)
        return results

    return call


def _tell_of_changes(arguments: Sequence[Any], item: Operator) -> None:
    changed = [arguments[place] for place in item.changes]
    torch.autograd.graph.increment_version([x for x in changed if x is not None and not x.is_inference()])


class Steps(str):
    """A namespace whose operators are run by steps, each of which was made when its operator first ran here.

    While it is open it makes them. Of an operator that runs twice there are none: a step is for one call's shapes.
    """

    namespace: str
    known: dict[type, Step]
    repeated: set[type]
    backwards: Kinds
    kind: Kind | None

    def __new__(cls, namespace: str, kind: Kind | None = None) -> Steps:
        """Opens steps for `namespace`; they are kept for a kind of call, if for one, as soon as they are closed."""
        self = super().__new__(cls, namespace)
        self.namespace, self.kind = namespace, kind
        self.known, self.repeated, self.backwards = {}, set(), Kinds(MOST_BACKWARDS)
        self.is_open = True
        return self

    def run(self, call: Any) -> Any:
        """Runs the operator of `call`."""
        kind = call.__class__
        if not self.is_open:
            step = self.known.get(kind)
            return run(self.namespace, call) if step is None else step(call)
        function = function_of(self.namespace, call.operator)
        if kind in self.known or self.namespace not in recorders:
            self.repeated |= {kind} & self.known.keys()
            self.known.setdefault(kind, lambda call: function(*call))
            return function(*call)
        item = OPERATORS[call.operator]
        step, results = recorders[self.namespace](item, call)
        self.known[kind] = step
        if item.changes:
            told = _telling_of_changes(lambda *arguments: step(call._make(arguments)), item)
            self.known[kind] = lambda call: told(*call)
            _tell_of_changes(call, item)
        return results

    def close(self) -> None:
        """Ends the making of steps."""
        for kind in self.repeated:
            del self.known[kind]
        self.is_open = False
        if self.kind is not None:
            self.kind.kept = self

    def of_backward(
        self, saved: Sequence[Tensor | None], grads: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> str:  # fmt: skip
        """Returns the steps of the backward for tensors like these; open ones where there are none yet."""
        if is_watched():
            return self.namespace
        # What was saved may have been laid out anew meanwhile, by hooks of the user's.
        tensors = [x for x in (*saved, *grads) if x is not None]
        known = (precision_of(tensors[0]), *wanted, *[grad is None for grad in grads])
        found = self.backwards.find(known, tensors) or self.backwards.add(known, tensors)
        if found.kept is not None:
            return found.kept
        return Steps(self.namespace, found) if are_plain(tensors) else self.namespace
