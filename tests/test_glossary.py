"""Terms: each is explained once, and is found where it stands."""

from deepspectra.glossary import GLOSSARY, terms_in


def test_every_word_belongs_to_one_term_and_every_term_has_its_place():
    words = [word for term in GLOSSARY for word in term.words]
    assert len(words) == len(set(words))
    anchors = [term.anchor for term in GLOSSARY]
    assert len(anchors) == len(set(anchors))
    assert all(set(anchor) <= set("abcdefghijklmnopqrstuvwxyz-") for anchor in anchors)


def test_terms_are_found_in_a_sentence():
    found = terms_in("7 outliers above the bulk's edge; knock-out by projection leaves none.")
    assert [term.name for term in found] == ["bulk", "outlier", "knock-out"]
    assert terms_in("Nothing.") == []
