package identity

import (
	"bytes"
	"encoding/json"
	"os"
	"regexp"
	"strings"
	"testing"

	"causeway/lb"
)

// example matches a key and the JSON after it in docs/formats.md.
var example = regexp.MustCompile("(?s)Key `([^`]+)`[^\n]*\n?[^\n]*:\n\n```json\n(.*?)```")

// TestDocumentedFormats holds docs/formats.md to what the decoders take and the encoders write.
func TestDocumentedFormats(t *testing.T) {
	page := must[[]byte](t)(os.ReadFile("../docs/formats.md"))
	examples := example.FindAllStringSubmatch(string(page), -1)
	if blocks := strings.Count(string(page), "```json"); len(examples) != blocks || blocks != 8 {
		t.Errorf("%d examples in %d blocks of JSON, want 8", len(examples), blocks)
	}
	for _, e := range examples {
		key, value := e[1], []byte(e[2])
		encoded, err := recode(key, value)
		if err != nil {
			t.Error(err)
			continue
		}
		if !sameJSON(t, value, encoded) {
			t.Errorf("%s: the page says\n%s, the encoder writes\n%s", key, value, encoded)
		}
	}
	if labels := LabelsKey("east", app("shop")); !strings.Contains(string(page), strings.TrimPrefix(labels, "causeway/v1/")) {
		t.Errorf("the page hasn't %s", labels)
	}
}

// recode decodes a documented value and encodes it again.
func recode(key string, value []byte) ([]byte, error) {
	kind, _, _ := strings.Cut(strings.TrimPrefix(key, "causeway/v1/"), "/")
	switch kind {
	case "cluster":
		c, err := DecodeCluster(key, value)
		return EncodeCluster(c), err
	case "heartbeat":
		h, err := DecodeHeartbeat(key, value)
		return EncodeHeartbeat(h), err
	case "nodes":
		n, err := DecodeNode(key, value)
		return EncodeNode(n), err
	case "addresses":
		a, err := DecodeAddress(key, value)
		return EncodeAddress(a), err
	case "identities":
		i, err := DecodeIdentity(key, value)
		return EncodeIdentity(i), err
	case "services":
		s, err := lb.DecodeService(key, value)
		return lb.EncodeService(s), err
	default:
		s, err := lb.DecodeSlice(key, value)
		if err != nil {
			return nil, err
		}
		return lb.Expand(lb.EncodeSlice(s))
	}
}

// sameJSON compares without the order of an object's members.
func sameJSON(t *testing.T, a, b []byte) bool {
	normal := func(doc []byte) string {
		var v any
		d := json.NewDecoder(bytes.NewReader(doc))
		d.UseNumber()
		if err := d.Decode(&v); err != nil {
			t.Fatal(err)
		}
		return string(must[[]byte](t)(json.Marshal(v)))
	}
	return normal(a) == normal(b)
}
