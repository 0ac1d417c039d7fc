"""Rows that tests of training and of evaluation share."""

import datasets
import pytest


@pytest.fixture
def uneven() -> datasets.Dataset:
    """Lists of 2, 4, 3, 2 and 3 documents."""
    lists = []
    for i, length in enumerate((2, 4, 3, 2, 3)):
        scores = [3.0, float(i), -1.0, -2.0]
        lists.append({"query_id": 100 + i, "doc_ids": [i, 9, 20, 30 + i][:length], "teacher_scores": scores[:length]})
    return datasets.Dataset.from_list(lists)
