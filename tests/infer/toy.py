"""A tokenizer of bytes, for models of any small vocabulary: id = byte, and one special end token."""


def latents_of(engine):
    """The pages that an engine keeps latents in."""
    return engine._stepper.runner.pages


class ByteTokenizer:
    eos_id = 256
    bos_id = 257
    vocab_size = 258

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids, skip_special=True):
        shown = [id for id in ids if id < 256 or not skip_special]
        return b"".join(self.token_bytes(id) for id in shown).decode(errors="replace")

    def token_bytes(self, id):
        return bytes([id]) if id < 256 else {256: b"<end>", 257: b"<begin>"}[id]

    def encode_chat(self, messages, add_generation_prompt=False):
        ids = [self.bos_id]
        for message in messages:
            ids += [*f"{message.role[0]}:{message.content}".encode(), self.eos_id]
        return ids + list(b"a:") * add_generation_prompt
