"""A hundred prompts for the demo pair: story openings, word problems and Python stubs, made from templates in a fixed order."""

_PEOPLE = ("Tom", "Lily", "the old farmer", "a small rabbit", "Mia", "Ben and Sue", "the baker", "a shy dragon", "Grandma", "Max")
_PLACES = ("in the garden", "by the river", "at school", "on a high hill", "in a dark forest", "at the market")
_THINGS = ("ball", "kite", "cookie", "lamp", "boat", "flower", "hat")
_STORIES = (
    "Once upon a time, there was {person} who lived {place}. One day, {person} found a {thing}",
    "It was a sunny morning {place}. {person} wanted to play with the {thing}, but",
    '"Look at my new {thing}!" said {person}. They were {place}, and',
    "{person} lost a {thing} {place}. So",
    "Long ago, {place}, a {thing} began to sing. {person} heard it and",
)
_SUMS = (
    "{person} has {a} apples and buys {b} more. How many apples are there now?",
    "A box holds {a} pencils. {person} fills {b} boxes. How many pencils are there in all?",
    "Question: {person} reads {a} pages a day. How many pages is that in {b} days?\nAnswer:",
    "There were {a} birds on a tree. {b} flew away. How many birds are left?",
)
_NAMES = ("add", "is_even", "count_words", "reverse_list", "maximum", "average", "factorial")
_CODE = (
    'def {name}(x):\n    """',
    "def {name}(items):\n    result = []\n    for item in items:\n",
    "# {name} {a}\nfor i in range({b}):\n",
    "class {title}:\n    def __init__(self, value):\n        self.value = value\n\n    def {name}(self",
    "import math\n\ndef {name}(a, b):\n    return",
)


def _pick(items: tuple[str, ...], i: int) -> str:
    return items[i % len(items)]


def _prompt(i: int) -> str:
    kind, turn = divmod(i, 3)
    words = {
        "person": _pick(_PEOPLE, kind), "place": _pick(_PLACES, kind + kind // 6), "thing": _pick(_THINGS, kind),
        "a": str(7 + 5 * i % 83), "b": str(2 + 3 * i % 11),
        "name": _pick(_NAMES, kind), "title": _pick(_NAMES, kind + 2).title().replace("_", ""),
    }  # fmt: skip
    return _pick((_STORIES, _SUMS, _CODE)[turn], kind).format(**words)


PROMPTS = tuple(_prompt(i) for i in range(100))
