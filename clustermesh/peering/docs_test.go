package peering

import (
	"bytes"
	"encoding/json"
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"
)

// TestDocumentedFormats holds docs/formats.md to what is written and read here.
func TestDocumentedFormats(t *testing.T) {
	page := string(mustGet[[]byte](t)(os.ReadFile("../../docs/formats.md")))

	token, err := ParseToken(regexp.MustCompile(`cm1\.[A-Za-z0-9_-]{20,}`).FindString(page))
	must(t, err)
	if token.Cluster != "west" || !token.Expires.Equal(time.Date(2026, 10, 1, 12, 15, 0, 0, time.UTC)) {
		t.Errorf("the token is %+v", token.LogValue())
	}

	record := documented(t, page, `{"id": "`)
	r, err := decodeTokenRecord(tokenKey(token.ID), record)
	must(t, err)
	same(t, record, encodeTokenRecord(r))
	if made := recordOf(token); !bytes.Equal(made.Secret, r.Secret) {
		t.Error("the record is not the token's")
	}

	p := samplePeer(t)
	p.Authority, p.Cert, p.Key = "…", "…", "…"
	same(t, documented(t, page, `{"cluster": {"name": "west"`), EncodePeer(p))

	for _, key := range []string{AuthorityKey, RingKey, PeerKey("CLUSTER"), tokenKey("ID"), connectingKey} {
		if name := "| `" + strings.TrimPrefix(key, "causeway/private/v1/") + "` |"; !strings.Contains(page, name) {
			t.Errorf("the page hasn't %s", name)
		}
	}
}

// documented returns the JSON document of the page that begins so.
func documented(t *testing.T, page, begin string) []byte {
	t.Helper()
	var value json.RawMessage
	if at := strings.Index(page, begin); at < 0 {
		t.Fatalf("the page hasn't %s", begin)
	} else {
		must(t, json.NewDecoder(strings.NewReader(page[at:])).Decode(&value))
	}
	return value
}

func same(t *testing.T, documented, written []byte) {
	t.Helper()
	var a, b any
	must(t, json.Unmarshal(documented, &a))
	must(t, json.Unmarshal(written, &b))
	if !reflect.DeepEqual(a, b) {
		t.Errorf("the page says\n%s, and written is\n%s", documented, written)
	}
}
