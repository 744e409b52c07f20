def score() -> None:
    """stub"""
