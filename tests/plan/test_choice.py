import pytest

from qwenft.capabilities import Availability, Backend
from qwenft.machine import Machine
from qwenft.plan.choice import choose

MACHINE = Machine.named("RTX4090")


class Candidate(Backend):
    """A backend that is nothing but its declarations."""

    uses_flash_lib = False
    name = ""
    supports_packing = True

    def __init__(self, name, packs=True, half=False, usable=True, refusal=None):
        self.name = name
        self.supports_packing = packs
        self.needs_half_precision = half
        self.usable = usable
        self.refusal = refusal

    def fields(self):
        """What it is compared by."""
        return {"name": self.name}

    def availability(self, machine):
        """As it was told."""
        return Availability(self.usable, f"not for {machine.name}")

    def refuses(self, problem):
        """As it was told."""
        return self.refusal and f"{self.refusal} of {problem}"


ANY = Candidate("any")


def pick(*candidates, packed=True, compute_dtype="bfloat16"):
    return choose(candidates, "the problem", MACHINE, packed=packed, compute_dtype=compute_dtype)


def test_the_first_that_can_is_chosen():
    """The best candidate is taken where nothing speaks against it, and nothing is passed over."""
    choice = pick(Candidate("best"), ANY)
    assert choice.backend.name == "best"
    assert choice.passed_over == ()


@pytest.mark.parametrize(
    ("candidate", "options", "why"),
    [
        (Candidate("best", packs=False), {}, "best (cannot pack)"),
        (Candidate("best", half=True), {"compute_dtype": "float32"}, "best (computes in 16 bits only)"),
        (Candidate("best", refusal="heads"), {}, "best (heads of the problem)"),
        (Candidate("best", usable=False), {}, "best (not for RTX4090)"),
    ],
)
def test_one_that_cannot_is_passed_over_with_its_reason(candidate, options, why):
    """Each hindrance passes a candidate over, in its own words."""
    choice = pick(candidate, ANY, **options)
    assert choice.backend is ANY
    assert choice.passed_over == (why,)


def test_what_is_not_asked_hinders_nothing():
    """A backend that cannot pack serves unpacked data, and one for 16 bits serves bfloat16."""
    assert pick(Candidate("best", packs=False), ANY, packed=False).backend.name == "best"
    assert pick(Candidate("best", half=True), ANY).backend.name == "best"


def test_the_order_of_candidates_is_kept():
    """All that are better than the chosen one are named, best first."""
    choice = pick(Candidate("first", packs=False), Candidate("second", usable=False), ANY, Candidate("last"))
    assert choice.passed_over == ("first (cannot pack)", "second (not for RTX4090)")


def test_a_list_in_which_none_can_is_a_mistake_of_ours():
    """The last candidate must always be able to; where it is not, that is no error of the user."""
    with pytest.raises(AssertionError, match=r"no backend can: best \(cannot pack\)"):
        pick(Candidate("best", packs=False))
