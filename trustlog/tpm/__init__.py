"""TPM 2.0: an attested log whose head is a platform configuration register (PCR), and what verifies it.

What a verifier needs, in plain Python on ``cryptography``: ``structures`` (byte layouts of the TCG's "Trusted Platform
Module Library", version 1.59), ``quote`` (what a TPM attests), ``chain`` (what a log makes of it), ``credential`` and
the second half of ``enrol`` (which TPM holds a key), the first half of ``anchors`` (heads that outlive an epoch).

What the log's host needs: ``wire`` and ``client`` (the TPM's commands), ``folder`` and ``backend`` (the log).

This module imports none of them: verifiers need no client.
"""
