"""FER-2013 faces for the base policy: captions and responses by label, vision pretraining."""
