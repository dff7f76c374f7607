"""Wikipedia's markup as plain text: templates, tables, references and pictures are dropped."""
import html
import re

HIDDEN = re.compile(r"<!--.*?-->|<ref\b[^<>]*/>|"
                    r"<(ref|math|gallery|timeline|source|imagemap)\b[^<>]*>.*?</\1\s*>",
                    re.S | re.I)
TEMPLATE = re.compile(r"\{\{([^{}]*)\}\}")
TABLE = re.compile(r"\{\|(?:(?!\{\|).)*?\|\}", re.S)
OUTER_LINK = re.compile(r"\[(?:https?:|ftp:|mailto:)?//[^\s\]]*\s*([^\[\]]*)\]")
LINK = re.compile(r"\[\[((?:[^\[\]{}]|\[[^\[\]{}]*\])*)\]\]")
NO_PROSE = re.compile(r"\s*(file|image|category|media|[a-z]{2,3}|simple)\s*:", re.I)
KEPT = {"lang", "transl", "nowrap", "small", "smaller", "big", "angbr", "vanchor", "quote",
        "nihongo"}
ENDING = {"references", "external links", "see also", "further reading", "notes", "bibliography",
          "footnotes", "sources", "citations", "notes and references", "gallery", "works cited"}


def until_stable(pattern, replacement, text):
    """Replace from the inside outwards, as what is replaced may lie in more of its kind."""
    count = 1
    while count:
        text, count = pattern.subn(replacement, text)
    return text


def of_template(match):
    """The few templates that stand for words of a sentence; all others are dropped."""
    name, *rest = [part.strip() for part in match[1].split("|")]
    name = name.lower()
    words = [part for part in rest if not re.match(r"[\w ]+=", part)]
    if name in ("convert", "cvt") and len(words) > 1:
        return f"{words[0]} {words[1]}"
    if (name in KEPT or name.startswith("lang-")) and words:
        return words[0] if name in ("nihongo", "quote") else words[-1]
    return ""


def of_link(match):
    """A link's words; of pictures and categories nothing."""
    target, *words = match[1].split("|")
    if NO_PROSE.match(target):
        return ""
    return words[-1] if words else target.removeprefix(":")


def clean(text):
    """Wikipedia's markup -> plain text: paragraphs, lists and headings, up to the references."""
    text = HIDDEN.sub("", text)
    text = OUTER_LINK.sub(r"\1", text)
    text = until_stable(LINK, of_link, text)                     # they have bars, as templates have
    text = until_stable(TEMPLATE, of_template, text)
    text = until_stable(TABLE, "", text)
    text = until_stable(LINK, of_link, text)                     # those around templates
    text = re.sub(r"<br\s*/?>", "\n", text, flags=re.I)
    text = re.sub(r"</?[a-zA-Z][^<>]*>|'{2,}|__[A-Z]+__", "", text)
    text = html.unescape(text).replace("\u00a0", " ").replace("\u2009", " ")
    # What templates left behind: brackets with nothing in them, space before a comma.
    text = re.sub(r"\(\s*[,;:.\s]*\)", "", text)
    text = re.sub(r"\([,;:\s]+", "(", text)
    text = re.sub(r"[ \t]+([,.;:)])", r"\1", text)
    text = re.sub(r",(\s*,)+", ",", text)
    text = re.sub(r"[ \t]{2,}", " ", text)
    return "\n".join(paragraphs(text)).strip() + "\n"


def paragraphs(text):
    """The lines of an article, one blank line between blocks; headings only where text follows."""
    lines = []
    waiting = []                                                 # headings without text so far
    for line in map(str.strip, text.split("\n")):
        heading = re.fullmatch(r"(=+)\s*(.*?)\s*\1", line)
        if heading:
            if len(heading[1]) == 2 and heading[2].lower() in ENDING:
                break
            waiting = [one for one in waiting if len(one[1]) < len(heading[1])] + [heading]
            continue
        line = re.sub(r"^[*#:;]+\s*", lambda mark: "- " if mark[0][0] in "*#" else "", line)
        if not re.search(r"\w", line) or line[0] in "|!{}":
            lines.append("")
            continue
        for one in waiting:
            lines += ["", one[2], ""]
        waiting = []
        lines.append(line)
    return [line for line, before in zip(lines, ["", *lines]) if line or before]
