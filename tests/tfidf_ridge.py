"""The classical yardstick: TF-IDF + ridge regression on the same prompts, judged by the same figures.

    python tests/tfidf_ridge.py outputs/datasets/items_prompts_demo
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline

from items import load_prompts
from util import evaluate


def main(folder):
    splits = load_prompts(folder)
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2), RidgeCV((0.1, 0.3, 1, 3, 10)))
    model.fit(splits["train"]["prompt"], [float(price) for price in splits["train"]["completion"]])
    evaluate(lambda rows: list(model.predict([row["prompt"] for row in rows])), splits["test"], None, 1000,
             title="TF-IDF + ridge")


if __name__ == "__main__":
    main(*sys.argv[1:])
