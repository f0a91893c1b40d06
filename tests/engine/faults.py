"""A forward pass that does what a test wants."""

from dataclasses import replace

import numpy as np

from radix_mlp import forward_compact


class InjectedForward:
    """Calls `before(plan, needed rows)`, which may raise, and then the model; or `instead` of it."""

    is_made, packs = True, False
    failure = None

    def __init__(self, engine, before=None, instead=None):
        self.engine = engine
        self.before = before
        self.instead = instead

    def prepare(self, plan):
        plan.to(self.engine.model.device)

    def describe(self):
        return "injected"

    def make(self):
        return self

    def refresh(self):
        return False

    def reconsider(self):
        pass

    def check(self):
        pass

    def close(self):
        pass

    def __call__(self, plan, needed_rows):
        if self.before is not None:
            self.before(plan, needed_rows)
        return forward_compact(self.engine.model, plan) if self.instead is None else self.instead(plan, needed_rows)


def without_expiry(engine):
    """A forward in which siblings see each other: no row ever leaves their view."""

    def forward(plan, needed_rows):
        wrong = replace(plan, end=np.full_like(plan.end, plan.num_rows))
        return forward_compact(engine.model, wrong)

    return InjectedForward(engine, instead=forward)
