"""The classical yardstick: TF-IDF + ridge regression on the same prompts, by the same figures.

    python tests/tfidf_ridge.py outputs/datasets/items_prompts_demo
    python tests/tfidf_ridge.py outputs/datasets/items_prompts_demo FILE outputs/base

The second line judges the items of FILE instead, cut by that model's tokenizer.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline

from items import load_prompts, own_rows
from util import evaluate, load_tokenizer, truth_of

CUTOFF = 110  # tokens


def main(folder, source=None, base=None):
    splits = load_prompts(folder)
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    model = make_pipeline(words, RidgeCV((0.1, 0.3, 1, 3, 10)))
    train = splits["train"]
    model.fit(train["prompt"], [truth_of(row) for row in train])

    test = splits["test"]
    if source:
        test, _ = own_rows(source, None, load_tokenizer(base), CUTOFF)

    def guess(rows):
        return list(model.predict([row["prompt"] for row in rows]))

    evaluate(guess, test, size=None, batch_size=1000, title="TF-IDF + ridge")


if __name__ == "__main__":
    main(*sys.argv[1:])
