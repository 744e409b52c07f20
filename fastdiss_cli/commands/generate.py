def generate() -> None:
    """stub"""
