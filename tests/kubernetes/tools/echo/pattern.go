package main

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
)

// newPattern returns the bytes that every transfer carries: the same on both ends and never repeating, so that a piece
// that is lost, doubled or out of place changes the digest.
func newPattern(length int64) io.Reader {
	return io.LimitReader(rand.NewChaCha8([32]byte{'t', 'p', 'd'}), length)
}

// patternDigest is the digest that a transfer of this length must have.
func patternDigest(length int64) string {
	digest := newDigest()
	if _, err := io.CopyBuffer(digest, newPattern(length), make([]byte, 1<<18)); err != nil {
		panic(err) // neither a generator nor a hash can fail
	}
	return digest.String()
}

// digest counts and hashes what is written to it.
type digest struct {
	hash  hash.Hash
	count int64
}

func newDigest() *digest { return &digest{hash: sha256.New()} }

func (d *digest) Write(p []byte) (int, error) {
	d.count += int64(len(p))
	return d.hash.Write(p)
}

// String is the form that both ends exchange and compare.
func (d *digest) String() string {
	return fmt.Sprintf("%d bytes, sha256 %s", d.count, hex.EncodeToString(d.hash.Sum(nil)))
}
