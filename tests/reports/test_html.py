from html.parser import HTMLParser

from qwenft.display import html_table
from qwenft.machine import Machine
from qwenft.recipe import Recipe
from qwenft.specs.adapter import AdapterSpec
from qwenft.specs.data import DataSpec
from qwenft.specs.model import ModelSpec

SCRIPT = "<script>alert('&')</script>"


class Reader(HTMLParser):
    """Collects what a browser would see: tags that open and close, and text."""

    def __init__(self):
        super().__init__()
        self.opened, self.seen, self.text = [], set(), []

    def handle_starttag(self, tag, attributes):
        """Nothing may be loaded from elsewhere."""
        self.opened.append(tag)
        self.seen.add(tag)
        assert not {"src", "href"} & {name for name, _ in attributes}

    def handle_endtag(self, tag):
        """Only what is open is closed."""
        assert self.opened.pop() == tag

    def handle_data(self, data):
        """Text, as it is read."""
        self.text.append(data)


def read(html):
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.opened == []
    assert reader.seen <= {"div", "strong", "table", "thead", "tbody", "tr", "th", "td"}
    return reader.text


def test_a_table_escapes_its_cells():
    """Whatever a cell or a heading holds is text."""
    html = html_table((SCRIPT, "b"), [("<b>", "&amp;"), ("x", '"')])
    assert "<script" not in html
    assert read(html) == [SCRIPT, "b", "<b>", "&amp;", "x", '"']


def test_a_plan_is_shown_whole_and_escaped(tmp_path):
    """The plan's facts, coverage and findings are in the tables, and markup in a path, a row or a name is text."""
    path = tmp_path / f"{SCRIPT.replace('/', '')}.jsonl"
    path.write_text('{"messages": [{"role": "<script>evil</script>", "content": "Hi"}]}\n')
    machine = Machine(SCRIPT, "cpu", cores=2, host_bytes=2**33)
    recipe = Recipe(ModelSpec("qwen3.5-4b"), DataSpec.messages(path), AdapterSpec.lora().on("router"))
    plan = recipe.compile(machine, strict=False)
    html = plan._repr_html_()
    assert "<script" not in html
    text = read(html)
    for row in plan.coverage:
        assert row.role in text
        assert f"{row.parameters:,}" in text
    for finding in plan.findings:
        assert finding.level in text
        assert any(cell.startswith(finding.problem) for cell in text)
        assert finding.fix is None or any(cell.endswith(finding.fix) for cell in text)
    assert SCRIPT in text
    assert any("got '<script>evil</script>'" in cell for cell in text)
