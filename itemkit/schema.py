"""Names that several rooms share: columns, labels, and the version of the on-disk feature schema."""

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

# feature columns
CAPTION_LOGPROB = "caption_logprob"
CAPTION_TOKENS = "caption_tokens"
N_OBJECTS = "n_objects"
IMAGE_EMB = "image_emb"
CAPTION_EMB = "caption_emb"
REGION_EMB = "region_emb"
PHRASE_EMB = "phrase_emb"
OBJECTS = "objects"
# lengths of the embeddings before they are normalised; a store written before 0.2 has none
IMAGE_NORM = "image_norm"
CAPTION_NORM = "caption_norm"
REGION_NORM = "region_norm"
PHRASE_NORM = "phrase_norm"

SPLITS = ("train", "val", "test")

SCHEMA_VERSION = 1
