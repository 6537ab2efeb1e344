"""The page of the cascade's benchmark says what its record holds, and its ratios are those of the times."""

from bench.cascade import page
from bench.lab.rounds import timing_of


def times(**ms):
    return {name: timing_of(64, rounds) for name, rounds in ms.items()}


def test_the_page_has_the_speeds_and_the_share_of_the_expected_time():
    record = {
        "command": "python bench/cascade.py",
        "machine": {"device": "a processor"},
        "saturates": True,
        "threads": 2,
        "num_images": 64,
        "num_rounds": 3,
        "share_escalated": 0.25,
        "evidence": {"threshold": 0.5, "share_escalated": 0.2, "num_test": 1000},
        "batches": {
            "1": times(int8=[10, 20, 40], fp32=[100, 80, 160], cascade=[20, 40, 80]),
            "32": times(int8=[8, 8, 8], fp32=[16, 16, 16], cascade=[32, 32, 32]),
        },
    }
    text = page(record)
    # 20 + 0.25 · 100 = 45 ms expected at batch 1, and 8 + 0.25 · 100 = 33 at batch 32
    assert "| 1 | 3,200 (1,600–6,400) | 640 (400–800) | 1,600 (800–3,200) | 2.00 | 2.00 | 0.89 |" in text
    assert "| 32 | 8,000 (8,000–8,000) | 4,000 (4,000–4,000) | 2,000 (2,000–2,000) | 0.50 | 4.00 | 0.97 |" in text
    assert "25.0 % of the 64 test images that are timed here,\n20.0 % of all 1,000" in text
    assert "as they do without VNNI: yes." in text
    assert "With AVX2 alone" not in text
    halves = times(int8=[20, 20, 20], fp32=[40, 40, 40], cascade=[40, 40, 40])
    text = page({**record, "avx2": {"share_escalated": 0.5, "batches": {"1": halves}}})
    # 20 + 0.5 · 40 = 40 ms expected
    assert "With AVX2 alone" in text
    assert "| 1 | 3,200 (3,200–3,200) | 1,600 (1,600–1,600) | 1,600 (1,600–1,600) | 1.00 | 2.00 | 1.00 |" in text
