"""tieaudit tells the truth about weight tying: which weights of a model are one, claim to be, or once were."""

__version__ = "0.1.0"
