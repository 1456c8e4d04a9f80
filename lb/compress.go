package lb

import (
	"bytes"
	"fmt"

	"github.com/klauspost/compress/zstd"
)

// zstdMagic begins every Zstandard frame (RFC 8878, section 3.1.1), and no JSON.
var zstdMagic = []byte{0x28, 0xb5, 0x2f, 0xfd}

// Values are small, so that a small window, and few tables, are enough. Both are made in full when the program begins: they have channels, which could not be
// shared by bubbles of testing/synctest otherwise.
var (
	compressor = newCompressor()
	expander   = made(zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxMemory(MaxValue), zstd.WithDecoderMaxWindow(MaxValue)))
)

func newCompressor() *zstd.Encoder {
	c := made(zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(MaxValue), zstd.WithLowerEncoderMem(true)))
	c.EncodeAll(zstdMagic, nil)
	return c
}

// made takes what cannot fail to be made, as its options are constants.
func made[T any](v T, err error) T {
	if err != nil {
		panic("lb: " + err.Error())
	}
	return v
}

func compress(value []byte) []byte { return compressor.EncodeAll(value, nil) }

// Expand returns a stored value as JSON, whether it is compressed or not, of at most MaxValue bytes if it is.
func Expand(value []byte) ([]byte, error) {
	if !bytes.HasPrefix(value, zstdMagic) {
		return value, nil
	}
	if len(value) > MaxValue {
		return nil, fmt.Errorf("value has %d bytes, at most %d are allowed", len(value), MaxValue)
	}
	expanded, err := expander.DecodeAll(value, nil)
	if err != nil {
		return nil, fmt.Errorf("value cannot be decompressed to at most %d bytes: %w", MaxValue, err)
	}
	return expanded, nil
}
