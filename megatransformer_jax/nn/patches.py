"""Images as patches."""

from jaxtyping import Array, Float


def patchify(
    images: Float[Array, "N height width C"], patch_size: int
) -> Float[Array, "N P pixels"]:
    """Squares of `patch_size`, row by row, each with all its values: rows, then columns, then C.

    Raises:
      ValueError: if patches do not fill the image.
    """
    count, height, width, channels = images.shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"an image of {height}x{width} is not filled by patches of {patch_size}x{patch_size}; "
            "choose a divisor of both sides."
        )
    rows, columns = height // patch_size, width // patch_size
    squares = images.reshape(count, rows, patch_size, columns, patch_size, channels)
    return squares.transpose(0, 1, 3, 2, 4, 5).reshape(count, rows * columns, -1)


def unpatchify(
    patches: Float[Array, "N P pixels"], patch_size: int, shape: tuple[int, int, int]
) -> Float[Array, "N height width C"]:
    """The images of this shape (height, width, C) whose `patchify` is given."""
    height, width, channels = shape
    rows, columns = height // patch_size, width // patch_size
    squares = patches.reshape(-1, rows, columns, patch_size, patch_size, channels)
    return squares.transpose(0, 1, 3, 2, 4, 5).reshape(-1, *shape)
