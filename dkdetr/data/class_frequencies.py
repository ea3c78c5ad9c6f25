"""How many training images show each base class: all that a federated loss needs to know."""

import numpy as np
from jaxtyping import Float

from dkdetr.data.splits import Split
from dkdetr.data.vocabulary import Vocabulary


def images_per_base_class(
    split: Split, vocabulary: Vocabulary
) -> Float[np.ndarray, "num_base_classes"]:
    """Returns the number of images with a base box of each class, by the vocabulary's base rows.

    Counted from the base boxes themselves: a data set's published counts know the rare classes.
    """
    table, base = split.base_table, vocabulary.base()
    if len(table.category_ids) == 0:
        return np.zeros(len(base))
    labels = np.array([base.label_of(number) for number in table.category_ids.tolist()])
    pairs = np.unique(np.stack((table.image_of_row(), labels)), axis=1)
    return np.bincount(pairs[1], minlength=len(base)).astype(np.float64)
