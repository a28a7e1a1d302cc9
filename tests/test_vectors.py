"""LianLian's genuine signatures: our source strings and signatures equal the gateway's."""

from base64 import b64decode

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.serialization import load_der_public_key

from lianlian_async import wire
from lianlian_async.signing import SigningKey, VerifyingKey, signature_source


def public_key_of(vectors, vector):
    """Return the public key for ``vector``: LianLian's, or that of the published test merchant."""
    material = vectors["keys"][vector["signed_by"]]
    if vector["signed_by"].endswith("private"):
        return SigningKey.load(material).public_key()
    return VerifyingKey.load(material)


def test_the_source_is_the_one_that_was_signed(vector):
    """The signature source of a genuine message equals the documented one, byte for byte."""
    assert signature_source(vector["fields"]) == vector["source"].encode()


def test_a_genuine_signature_verifies(vector, vectors):
    """A signature made by LianLian's own code is valid over our source."""
    fields = vector["fields"]
    assert public_key_of(vectors, vector).verify(signature_source(fields), fields["sign"])


def test_the_oracle_agrees(vector, vectors):
    """The independent implementation accepts the genuine signature over our source, with our exported key."""
    public = load_der_public_key(b64decode(public_key_of(vectors, vector).to_base64()))
    fields = vector["fields"]
    public.verify(
        b64decode(fields["sign"]), signature_source(fields), padding.PKCS1v15(), hashes.MD5()
    )  # raises if not


def test_the_merchant_request_is_reproduced_byte_for_byte(vectors):
    """Our signature with the published test key equals the published one."""
    key = SigningKey.load(vectors["keys"]["test_merchant_private"])
    vector = next(vector for vector in vectors["vectors"] if vector["signed_by"] == "test_merchant_private")
    assert key.sign(signature_source(vector["fields"])) == vector["fields"]["sign"]
    assert key.sign(vector["source"].encode()) == vector["fields"]["sign"]


def test_a_genuine_message_survives_the_wire(vector, vectors):
    """Encoded and decoded again, in whatever order, the message is the same and still verifies."""
    body = wire.encode(dict(reversed(vector["fields"].items())))
    fields = wire.decode(body)
    assert fields == vector["fields"]
    assert public_key_of(vectors, vector).verify(signature_source(fields), fields["sign"])


def test_any_change_breaks_the_signature(vector, vectors):
    """A changed, dropped or added field, ret_code and ret_msg among them, makes the signature invalid."""
    key = public_key_of(vectors, vector)
    fields = vector["fields"]
    names = set(fields) - {"sign"}
    changed = [fields | {name: fields[name] + "0"} for name in names]
    dropped = [{name: text for name, text in fields.items() if name != gone} for gone in names]
    for other in (*changed, *dropped, fields | {"unknown": "x"}):
        assert not key.verify(signature_source(other), fields["sign"])


def test_empty_and_null_fields_change_nothing(vector, vectors):
    """Fields without a value are not signed."""
    fields = vector["fields"] | {"empty": "", "null": None}
    assert public_key_of(vectors, vector).verify(signature_source(fields), fields["sign"])


def test_the_wrong_key_does_not_verify(vector, vectors, stranger_keys):
    """A genuine signature is not valid under another key."""
    assert not stranger_keys.public.verify(signature_source(vector["fields"]), vector["fields"]["sign"])
