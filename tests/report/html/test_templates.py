"""Sentences of the page."""

from __future__ import annotations

from moe_ray.report.html.templates import templates, unbroken


def test_no_line_ends_inside_an_interval_an_n_or_a_p():
    said = unbroken("refused 12.5% [1.0%, 24.0%] (n = 1,048); p = 5e-05, not -0.1 [-0.2, +0.1].")
    kept = [part.partition("</span>")[0] for part in said.split('<span class="number">')[1:]]
    assert kept == ["[1.0%, 24.0%]", "n = 1,048", "p = 5e-05", "[-0.2, +0.1]"]
    assert said.striptags() == "refused 12.5% [1.0%, 24.0%] (n = 1,048); p = 5e-05, not -0.1 [-0.2, +0.1]."


def test_the_rest_of_the_sentence_is_escaped():
    page = templates().from_string("{{ text|unbroken }}").render(text="<b>[1, 2]</b> [fraud] 'x'")
    assert page == '&lt;b&gt;<span class="number">[1, 2]</span>&lt;/b&gt; [fraud] &#39;x&#39;'
