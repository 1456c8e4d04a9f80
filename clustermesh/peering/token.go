package peering

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/fxamacker/cbor/v2"

	"causeway/identity/pki"
	"causeway/lb"
)

// TokenPrefix begins every token; the digit is the version of its format.
const TokenPrefix = "cm1."

const (
	maxToken     = 2 << 10 // characters
	maxEndpoints = 8
	secretSize   = 32 // bytes
	idSize       = 8  // bytes
	checksumSize = 4  // bytes: enough to notice what was mistyped, and nothing that a forger could not make
)

// Token lets one cluster join another, once, until it expires. After that nothing in it is worth anything.
type Token struct {
	// Mesh and Cluster that it was made in.
	Mesh    string
	Cluster string
	// ID names it in the records of its cluster.
	ID string
	// Secret proves that one was given it.
	Secret []byte
	// Authority is the fingerprint of the cluster's certificate authority, by which the cluster is known for certain.
	Authority pki.Fingerprint
	// Endpoints (host:port) of the peering API.
	Endpoints []string
	Expires   time.Time
}

// encodedToken is what a token is made of, as an array in deterministic CBOR (RFC 8949).
type encodedToken struct {
	_         struct{} `cbor:",toarray"`
	Mesh      string
	Cluster   string
	ID        []byte
	Secret    []byte
	Authority []byte
	Endpoints []string
	Expires   int64 // seconds since 1970
}

// newToken returns a token with a new ID and secret, which the caller fills in.
func newToken() Token {
	id, secret := make([]byte, idSize), make([]byte, secretSize)
	_, _ = rand.Read(id) // never fails: crypto/rand ends the program instead
	_, _ = rand.Read(secret)
	return Token{ID: idEncoding.EncodeToString(id), Secret: secret}
}

// idEncoding makes IDs that can be said on the phone, and be part of a key.
var idEncoding = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

// checkID refuses what is no token's ID.
func checkID(id string) error {
	raw, err := idEncoding.DecodeString(id)
	if err != nil || len(raw) != idSize || idEncoding.EncodeToString(raw) != id {
		return fmt.Errorf("%.40q is no token's ID: clustermesh token list shows them", id)
	}
	return nil
}

// String returns the token as one line, to hand over. It holds the secret: never log it.
func (t Token) String() string {
	id, _ := idEncoding.DecodeString(t.ID)
	body, err := tokenEncoding.Marshal(encodedToken{
		Mesh: t.Mesh, Cluster: t.Cluster, ID: id, Secret: t.Secret, Authority: t.Authority[:], Endpoints: t.Endpoints, Expires: t.Expires.Unix(),
	})
	if err != nil {
		panic(fmt.Sprintf("peering: a token does not marshal: %v", err)) // strings, bytes and numbers always do
	}
	sum := sha256.Sum256(body)
	return TokenPrefix + base64.RawURLEncoding.EncodeToString(append(body, sum[:checksumSize]...))
}

// LogValue keeps the secret out of logs.
func (t Token) LogValue() slog.Value {
	return slog.GroupValue(slog.String("id", t.ID), slog.String("cluster", t.Cluster))
}

// Errors of ParseToken; none shows any part of the text.
var (
	errNoToken  = fmt.Errorf("this is not a token: one is a single line that begins with %q, as clustermesh token create prints it", TokenPrefix)
	errNewToken = errors.New("the token is of a newer version than this program: update Causeway here, or create a token with the version that runs here")
	errBroken   = errors.New("the token is cut or mistyped, its checksum does not match: copy the whole line again")
	errWrapped  = errors.New("the token is broken up by white space: paste it as one line")
)

var tokenVersion = regexp.MustCompile(`^cm[0-9]{1,3}\.`)

// ParseToken reads a token. Errors never show the secret.
func ParseToken(text string) (Token, error) {
	text = strings.TrimSpace(text)
	payload, ours := strings.CutPrefix(text, TokenPrefix)
	switch {
	case !ours && tokenVersion.MatchString(text):
		return Token{}, errNewToken
	case !ours:
		return Token{}, errNoToken
	case len(text) > maxToken:
		return Token{}, fmt.Errorf("the token has %d characters, more than the %d that one has at most: copy the line of clustermesh token create, and nothing else", len(text), maxToken)
	case strings.ContainsAny(payload, " \t\r\n\v\f"):
		return Token{}, errWrapped
	}
	raw, err := base64.RawURLEncoding.Strict().DecodeString(payload)
	if err != nil || len(raw) <= checksumSize {
		return Token{}, errBroken
	}
	body, sum := raw[:len(raw)-checksumSize], sha256.Sum256(raw[:len(raw)-checksumSize])
	if !bytes.Equal(raw[len(body):], sum[:checksumSize]) {
		return Token{}, errBroken
	}
	t, err := decodeToken(body)
	if err != nil {
		return Token{}, fmt.Errorf("the token was not made by Causeway: %w", err)
	}
	if t.String() != text {
		return Token{}, errors.New("the token was not made by Causeway: it is encoded in another way")
	}
	return t, nil
}

func decodeToken(body []byte) (Token, error) {
	var e encodedToken
	if err := tokenDecoding.Unmarshal(body, &e); err != nil {
		return Token{}, errors.New("it does not hold what a token does") // CBOR's own errors may quote
	}
	if len(e.ID) != idSize || len(e.Secret) != secretSize || len(e.Authority) != len(pki.Fingerprint{}) {
		return Token{}, errors.New("its ID, secret or fingerprint has a wrong length")
	}
	if err := lb.CheckName("cluster", e.Cluster); err != nil {
		return Token{}, err
	}
	if err := checkMesh(e.Mesh); err != nil {
		return Token{}, err
	}
	if err := checkEndpoints(e.Endpoints); err != nil {
		return Token{}, err
	}
	t := Token{
		Mesh: e.Mesh, Cluster: e.Cluster, ID: idEncoding.EncodeToString(e.ID), Secret: e.Secret, Endpoints: e.Endpoints,
		Authority: pki.Fingerprint(e.Authority), Expires: time.Unix(e.Expires, 0).UTC(),
	}
	if year := t.Expires.Year(); year < 2000 || year >= 3000 {
		return Token{}, errors.New("the time that it expires at is not plausible")
	}
	return t, nil
}

// checkMesh refuses names of meshes that could not be shown in an error.
func checkMesh(mesh string) error {
	if !meshName.MatchString(mesh) {
		return fmt.Errorf("mesh name %.40q is not 1 to 64 letters, digits and -_.+", mesh)
	}
	return nil
}

var (
	meshName = regexp.MustCompile(`^[A-Za-z0-9._+-]{1,64}$`)
	hostName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,252}$`) // as resolvers take them, which is more than RFC 1123 allows
)

// checkEndpoints refuses a list of endpoints that is empty, too long, or has one that is not host:port.
func checkEndpoints(endpoints []string) error {
	if len(endpoints) == 0 || len(endpoints) > maxEndpoints {
		return fmt.Errorf("%d endpoints: there must be 1 to %d", len(endpoints), maxEndpoints)
	}
	for _, endpoint := range endpoints {
		if err := checkEndpoint(endpoint); err != nil {
			return err
		}
	}
	return nil
}

func checkEndpoint(endpoint string) error {
	host, port, err := net.SplitHostPort(endpoint)
	address, notAddress := netip.ParseAddr(host)
	if err != nil || address.Zone() != "" || notAddress != nil && !hostName.MatchString(host) {
		return fmt.Errorf("endpoint %.100q is not host:port", endpoint)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return fmt.Errorf("endpoint %.100q: the port is not 1 to 65535", endpoint)
	}
	return nil
}

// The encoding is deterministic and the decoding strict, so that there is one text for a token.
var tokenEncoding, tokenDecoding = tokenModes()

func tokenModes() (cbor.EncMode, cbor.DecMode) {
	enc, err := cbor.CoreDetEncOptions().EncMode()
	if err != nil {
		panic(err)
	}
	dec, err := cbor.DecOptions{
		DupMapKey: cbor.DupMapKeyEnforcedAPF, IndefLength: cbor.IndefLengthForbidden, TagsMd: cbor.TagsForbidden,
		UTF8: cbor.UTF8RejectInvalid, MaxArrayElements: 16, MaxMapPairs: 16, MaxNestedLevels: 4,
	}.DecMode()
	if err != nil {
		panic(err)
	}
	return enc, dec
}
