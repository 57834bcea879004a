"""Reads a single image, and describes the form in which a network reads images."""

import functools
import re
import warnings
from typing import NamedTuple

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch.nn import functional as F

from decoupled.errors import InputError, first_line

SIDE = 32  # all data sets here are converted to 32×32

# Pillow's formats that are not plain images: scientific containers, vector graphics, video
NOT_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}

# Pillow's modes that can be converted to RGB without loss
EIGHT_BIT_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}

# Pillow's raw modes of 16 bits per channel ("BGR;16" is 16 bits for three channels)
SIXTEEN_BITS = re.compile(r"L;16|.*;16[BLN]")

# Formats whose first frame is the image; the others are previews and depth maps, or layers
FIRST_FRAME_ONLY = {"MPO", "PSD"}

# Compressed formats whose decoders silently fill in what an interrupted copy left empty
FILLED_IN = {"AVIF", "JPEG", "MPO", "QOI", "WEBP"}
EMPTY_TAIL = bytes(512)  # no complete file ends like this
JPEG_END = b"\xff\xd9"  # unless zeros follow this marker

# TIFF tags
BITS_PER_SAMPLE = 258
SAMPLE_FORMAT = 339
UNSIGNED = {1, 4}  # sample formats: unsigned integers, and undefined

BACKGROUND = "white"  # shows through transparent pixels

TRANSPOSE = {  # how to turn an image upright, by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class InputForm(NamedTuple):
    """The images that a network reads and the classes it predicts. Saved with the network, so that it can classify
    other images.

    classes    their names, in the order of the logits
    mean, std  of each channel in [0, 1], for normalization
    resize     the shorter side is resized to this size,
    crop       then a square of this side length is cropped from the center
    size       and zero-padded to this side length
    grey       whether color is removed; the three channels are then equal
    """

    classes: list
    mean: tuple
    std: tuple
    resize: int = SIDE
    crop: int = SIDE
    size: int = SIDE
    grey: bool = False

    def read(self, path):
        """The image at ``path``: uint8 (size, size, 3). Raises InputError as ``read_image`` does."""
        from torchvision.transforms.v2 import functional as transforms

        image = read_image(path)
        if self.grey:
            image = image.convert("L")
        square = (self.crop, self.crop)
        if self.resize == self.crop and image.size != square:
            image = ImageOps.fit(image, square, Image.Resampling.BILINEAR)  # as folders.decode does for training
        pixels = transforms.pil_to_tensor(image)
        pixels = transforms.center_crop(transforms.resize(pixels, self.resize, antialias=True), self.crop)
        border = (self.size - self.crop) // 2
        return F.pad(pixels, (border, border, border, border)).expand(3, -1, -1).permute(1, 2, 0)


def read_image(path):
    """Reads the image at ``path`` as a viewer shows it: Pillow's RGB, 8 bits per channel.

    The image is turned upright by its EXIF orientation; a white background shows through transparency. Color profiles
    and gamma are ignored. Raises InputError, naming the file, if it is missing, damaged or not an image, or if it has
    more than 8 bits per channel, a color mode that cannot be converted, several frames, only transparent pixels, or too
    many pixels for Pillow.
    """
    try:
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")  # warnings about large images, odd transparency, damaged metadata
            with Image.open(file, formats=formats()) as image:
                check_kind(image, path)
                return render(image, path)
    except (InputError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{path} has more pixels than Pillow reads ({error}): make it smaller") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is damaged or not an image: replace it") from error
    except Exception as error:  # a decoder may raise anything on a damaged file
        if isinstance(error, OSError) and error.errno is not None:
            raise InputError(f"{path} cannot be read ({error.strerror}): name a readable image file") from error
        raise InputError(f"{path} is damaged ({first_line(error)}): replace it") from error


@functools.cache
def formats():
    """The image formats that are accepted, by Pillow's names."""
    Image.init()
    return [name for name in Image.ID if name not in NOT_IMAGES]


@functools.cache
def suffixes():
    """The file suffixes of these formats, in lowercase and with the dot."""
    readable = {*formats(), "MPO"}  # which Pillow opens as JPEG
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in readable)


def check_kind(image, path):
    """Raises InputError for an opened image that ``render`` would not show as a viewer does."""
    if image.mode in ("I", "F") or image.mode.startswith("I;") or has_more_than_8_bits(image):
        raise InputError(f"{path} has more than 8 bits per channel (mode {image.mode}): convert it to 8 bits")
    if image.format == "TIFF" and not UNSIGNED.issuperset(image.tag_v2.get(SAMPLE_FORMAT, UNSIGNED)):
        raise InputError(f"{path} has signed values: convert it to unsigned ones")
    if image.mode not in EIGHT_BIT_MODES:
        raise InputError(f"{path} has the color mode {image.mode}: convert it to RGB")
    if image.format == "PNG" and image.tile[0][3] in ("L;2", "L;4") and "transparency" in image.info:
        # Pillow scales the gray values to 8 bits, but not the transparent value
        raise InputError(f"{path} is transparent gray with fewer than 8 bits: convert it to 8 bits")
    if getattr(image, "is_animated", False) and image.format not in FIRST_FRAME_ONLY:
        raise InputError(f"{path} has {image.n_frames} frames: save the one to use as a separate image")
    if image.format in FILLED_IN and ends_in_zeros(image):
        raise InputError(f"{path} is damaged (its end is empty): replace it")


def has_more_than_8_bits(image):
    """Whether the file of an opened image has more than 8 bits per channel, which Pillow may silently truncate."""
    if image.format == "TIFF":
        return max(image.tag_v2.get(BITS_PER_SAMPLE, (1,))) > 8
    if image.format == "JPEG2000":
        return jpeg_2000_bits(read_contents(image)) > 8
    if image.format == "AVIF":
        return avif_bits(read_contents(image)) > 8
    for codec, _, _, arguments in image.tile:
        if not isinstance(arguments, tuple):
            arguments = (arguments,)
        if image.format == "PPM" and isinstance(arguments[-1], int):
            return arguments[-1] > 255  # the largest value that a pixel may have
        if codec == "SGI16" or SIXTEEN_BITS.fullmatch(str(arguments[0])):
            return True
        if image.format == "DDS" and str(arguments[-1]).startswith("BC6"):  # floating point
            return True
    return False


def read_contents(image):
    """The bytes of an opened image's file."""
    position = image.fp.tell()
    image.fp.seek(0)
    data = image.fp.read()
    image.fp.seek(position)
    return data


def jpeg_2000_bits(data):
    """Bits per channel, from the SIZ marker (ISO/IEC 15444-1, A.5.1): the largest depth of all components."""
    start = data.index(b"\xff\x4f\xff\x51") + 4
    components = int.from_bytes(data[start + 36 : start + 38], "big")
    depths = data[start + 38 : start + 38 + 3 * components : 3]
    return max((depth & 0x7F) + 1 for depth in depths)  # the highest bit means signed


def avif_bits(data):
    """Bits per channel of color and alpha, from the av1C boxes (AV1 in ISOBMFF, 2.3.3): 8, or 10 for anything
    deeper.
    """
    high_bit_depth = [flags[0] & 0x40 for flags in re.findall(rb"av1C..(.)", data, re.DOTALL)]
    return 10 if any(high_bit_depth) else 8


def ends_in_zeros(image):
    """Whether the end of a compressed image file is missing and filled with zeros."""
    data = read_contents(image)
    return data.endswith(EMPTY_TAIL) and not data.rstrip(b"\0").endswith(JPEG_END)


def render(image, path):
    """An opened image as a viewer shows it: upright, on the background, in RGB. Raises InputError if only the
    background shows: some programs write an alpha channel that they do not use.
    """
    image.load()
    method = TRANSPOSE.get(orientation(image))
    if method is not None:
        image = image.transpose(method)
    if image.has_transparency_data:
        if image.mode == "La":  # cannot be converted to RGBA directly
            image = image.convert("LA")
        image = image.convert("RGBA")
        _, most_opaque = image.getchannel("A").getextrema()
        if most_opaque == 0:
            raise InputError(f"{path} is transparent everywhere: remove its alpha channel")
        background = Image.new("RGBA", image.size, BACKGROUND)
        image = Image.alpha_composite(background, image)
    return image.convert("RGB")


def orientation(image):
    """The EXIF orientation of an image; 1 (upright) if the metadata cannot be read, as in viewers."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata may raise anything
        return 1
