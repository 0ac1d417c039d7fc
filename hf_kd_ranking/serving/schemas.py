"""Bodies of requests and answers: the formats of Cohere and Jina, and of Hugging Face text-embeddings-inference (TEI).

Fields that are not listed are ignored, as in those APIs.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

TOO_LARGE, BAD_REQUEST = 413, 400


def _check_characters(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text has half of a surrogate pair") from None
    return text


Text = Annotated[str, AfterValidator(_check_characters)]


class RequestBody(BaseModel):
    """The base of all requests: strict types, and the status of a text or a list beyond a limit."""

    model_config = ConfigDict(strict=True)
    limit_status: ClassVar[int] = BAD_REQUEST

    model: str | None = Field(None, description="Name of the model; the one that is served if it is left out.")


class Document(BaseModel):
    """A document as an object: its text, or the id of a document whose vectors are stored."""

    model_config = ConfigDict(strict=True, extra="allow")

    text: Text | None = None
    id: Text | int | None = Field(None, description="Without a text: id of a document of the server's index.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.text is None and self.id is None:
            raise ValueError("a document needs a text or an id")
        return self


def _kind(value: Any) -> str:
    return {dict: "<object>", list: "<list>"}.get(type(value), "<string>")


_KIND = Discriminator(_kind)


# Tags are in brackets, so that messages can leave them out.
StringOrObject = Annotated[Annotated[Text, Tag("<string>")] | Annotated[Document, Tag("<object>")], _KIND]
StringOrList = Annotated[Annotated[Text, Tag("<string>")] | Annotated[list[Text], Tag("<list>")], _KIND]


class RerankRequest(RequestBody):
    """The format of Cohere and Jina."""

    query: Text
    documents: list[StringOrObject] = Field(description="All of them with texts, or all by id.")
    top_n: int | None = Field(None, ge=1, description="Number of results; all if it is left out.")
    return_documents: bool = Field(False, description="Repeat each document in its result.")
    raw_scores: bool | None = Field(None, description="Scores of the model in place of their sigmoid.")
    truncate: bool = Field(True, description="False refuses texts that are longer than the model reads.")
    max_tokens_per_doc: int | None = Field(None, description="Accepted where it shortens no document.")
    rank_fields: None = Field(None, description="Not supported.")
    relevant_spans: None = Field(None, description="Not supported.")


class TextsRequest(RequestBody):
    """The format of text-embeddings-inference. Unlike there, texts are truncated unless `truncate` is false."""

    limit_status: ClassVar[int] = TOO_LARGE

    query: Text
    texts: list[Text]
    raw_scores: bool | None = Field(None, description="Scores of the model in place of their sigmoid.")
    return_text: bool = Field(False, description="Repeat each text in its result.")
    truncate: bool = Field(True, description="False refuses texts that are longer than the model reads.")


class EmbedRequest(RequestBody):
    """The format of text-embeddings-inference. Unlike there, vectors keep their length unless `normalize` is true."""

    limit_status: ClassVar[int] = TOO_LARGE

    inputs: StringOrList
    prompt_name: Literal["query", "document"] = Field("document", description="What the inputs are.")
    normalize: bool = Field(False, description="Scale vectors to length 1; the ranker's scores are of raw vectors.")
    truncate: bool = Field(True, description="False refuses texts that are longer than the model reads.")


class SearchRequest(RequestBody):
    """A query of the collection that is served."""

    query: Text
    k: int = Field(10, ge=1, le=100, description="Number of passages.")


def _form(body: Any) -> str:
    return "<texts>" if isinstance(body, dict) and "texts" in body else "<documents>"


AnyRerankRequest = Annotated[
    Annotated[RerankRequest, Tag("<documents>")] | Annotated[TextsRequest, Tag("<texts>")], Discriminator(_form)
]


class RerankResult(BaseModel):
    """A document's place in the request, and its score."""

    index: int
    relevance_score: float = Field(description="Sigmoid of the model's score, or the score itself.")
    document: dict[str, Any] | None = None


class RerankAnswer(BaseModel):
    """Results, best first by the model's score; ties keep the order of the request."""

    id: str
    model: str
    results: list[RerankResult]


class TextScore(BaseModel):
    """A text's place in the request, and its score."""

    index: int
    score: float
    text: str | None = None


class TermWeight(BaseModel):
    """A word of a sparse vector, and whether its text does not have it."""

    word: str
    weight: float
    is_expansion: bool


class Passage(BaseModel):
    """A document that was found."""

    doc_id: str
    score: float
    first_rank: int | None = Field(description="Its rank in the first stage; null if it is not there.")
    text: str = Field(description="Its text, or that of its best passage in a collection of passages.")
    passage_id: str = Field(description="Id of that passage, otherwise its own.")
    terms: list[TermWeight] | None = Field(description="Its heaviest words, for a SPLADE.")


class SearchAnswer(BaseModel):
    """Passages, best first; the number of candidates of the first stage, and the milliseconds of each stage."""

    query: str
    candidates: int | None
    stages_ms: dict[str, float]
    hits: list[Passage]
    terms: list[TermWeight] | None = Field(description="The heaviest words of the query, for a SPLADE.")


class ErrorAnswer(BaseModel):
    """The reason of a refusal: `message` for clients of Cohere, `error` and `error_type` for those of TEI."""

    message: str
    error: str
    error_type: str
