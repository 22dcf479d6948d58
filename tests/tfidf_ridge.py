"""The classical yardstick: TF-IDF + ridge regression on the same prompts, judged by the same figures.

    python tests/tfidf_ridge.py outputs/datasets/items_prompts_demo
    python tests/tfidf_ridge.py outputs/datasets/items_prompts_demo FILE outputs/base    # the file's items instead, cut by
"""                                                                                      # that model's tokenizer
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from transformers import AutoTokenizer

from items import load_prompts, own_rows
from util import evaluate


def main(folder, source=None, base=None):
    splits = load_prompts(folder)
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2), RidgeCV((0.1, 0.3, 1, 3, 10)))
    model.fit(splits["train"]["prompt"], [float(price) for price in splits["train"]["completion"]])
    test = splits["test"]
    if source:
        test = own_rows(source, None, AutoTokenizer.from_pretrained(base), 110)[0]
    evaluate(lambda rows: list(model.predict([row["prompt"] for row in rows])), test, None, 1000, title="TF-IDF + ridge")


if __name__ == "__main__":
    main(*sys.argv[1:])
