"""Names that several modules share: columns, labels, splits, and the notes that outputs carry."""

REAL, FAKE = 0, 1
LABEL_NAMES = {REAL: "real", FAKE: "fake"}
REAL_GENERATOR = "real"

# manifest columns
IMAGE_ID = "image_id"
PATH = "path"
LABEL = "label"
GENERATOR = "generator"
SOURCE = "source"
SPLIT = "split"
CAPTION = "caption"
MANIFEST_COLUMNS = (PATH, LABEL, GENERATOR, SOURCE, SPLIT, CAPTION)
TAGS = "tags"  # may stand beside them: "text; face", parts of which `findings.slices` tells

# feature columns
CAPTION_LOGPROB = "caption_logprob"
CAPTION_TOKENS = "caption_tokens"
N_OBJECTS = "n_objects"
IMAGE_EMB = "image_emb"
CAPTION_EMB = "caption_emb"
REGION_EMB = "region_emb"
PHRASE_EMB = "phrase_emb"
OBJECTS = "objects"

SPLITS = ("train", "val", "test")

# the value of SOURCE by which the mini laboratory's own images are known
LAB_SOURCE = "mini laboratory"
# what every output made with the mini models carries: on the laboratory's images, and on any others
LAB_NOTE = "mini laboratory: rendered scenes and small generators, not photographs"
MINI_WARNING = (
    "the mini models know rendered scenes only: on other images the path is real, the numbers mean nothing; "
    "use --preset fast or paper for results"
)
