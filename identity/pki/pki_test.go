package pki

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"net"
	"strings"
	"testing"
	"time"
)

var start = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func must[T any](v T, err error) func(t testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func newTestAuthority(t testing.TB) *Authority { return must(NewAuthority("east", start))(t) }

func verify(t testing.TB, a *Authority, cert []byte, host string, usage x509.ExtKeyUsage, at time.Time) error {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AddCert(a.Cert)
	_, err := must(ParseCert(cert))(t).Verify(x509.VerifyOptions{Roots: roots, DNSName: host, CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{usage}})
	return err
}

// TestHandshake has a server and a client show each other their certificates.
func TestHandshake(t *testing.T) {
	a, other := newTestAuthority(t), newTestAuthority(t)
	server := must(a.Issue(Request{User: FileServer, Server: true, Hosts: []string{"store.east", "172.29.1.2", "::1"}}, start))(t)
	client := must(a.Issue(Request{User: UserAgent}, start))(t)
	foreign := must(other.Issue(Request{User: UserAgent}, start))(t)
	for _, tc := range []struct {
		name, host string
		client     Pair
		at         time.Time
		want       string
	}{
		{"by name", "store.east", client, start, ""},
		{"by address", "172.29.1.2", client, start, ""},
		{"by IPv6 address", "::1", client, start, ""},
		{"a clock that is behind by 50 minutes", "store.east", client, start.Add(-50 * time.Minute), ""},
		{"until the end", "store.east", client, start.Add(LeafValidity - time.Minute), ""},
		{"expired", "store.east", client, start.Add(LeafValidity + time.Minute), "expired"},
		{"another host", "172.29.1.3", client, start, "172.29.1.3"},
		{"another cluster's client", "store.east", foreign, start, "unknown authority"},
	} {
		err := handshake(t, a, server, tc.client, tc.host, tc.at)
		if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
			t.Errorf("%s: got %v, want %q", tc.name, err, tc.want)
		}
	}
}

// handshake returns what a client that asks for host, or else the server, has against the other.
func handshake(t *testing.T, a *Authority, server, client Pair, host string, at time.Time) error {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AddCert(a.Cert)
	clock := func() time.Time { return at }
	clientEnd, serverEnd := net.Pipe()
	defer clientEnd.Close()
	served := make(chan error, 1)
	go func() {
		defer serverEnd.Close()
		served <- tls.Server(serverEnd, &tls.Config{
			Certificates: []tls.Certificate{must(server.TLS())(t)}, ClientCAs: roots, ClientAuth: tls.RequireAndVerifyClientCert, Time: clock,
		}).Handshake()
	}()
	c := tls.Client(clientEnd, &tls.Config{Certificates: []tls.Certificate{must(client.TLS())(t)}, RootCAs: roots, ServerName: host, Time: clock})
	if err := c.Handshake(); err != nil {
		return err
	}
	go c.Read(make([]byte, 1)) // takes the server's alert
	return <-served
}

func TestAuthorityOnlySignsLeaves(t *testing.T) {
	a := newTestAuthority(t)
	if !a.Cert.IsCA || !a.Cert.MaxPathLenZero || a.Cert.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign {
		t.Errorf("authority: CA %v, path length zero %v, usage %b", a.Cert.IsCA, a.Cert.MaxPathLenZero, a.Cert.KeyUsage)
	}
	if got := a.Cert.NotAfter.Sub(start); got != AuthorityValidity {
		t.Errorf("authority holds for %s", got)
	}
	// Whoever has a leaf can sign nothing with it.
	leaf := must(a.Issue(Request{User: "x"}, start))(t)
	if _, err := ParseAuthority(leaf.Cert, leaf.Key); err == nil || !strings.Contains(err.Error(), "not an authority's") {
		t.Errorf("leaf as authority: %v", err)
	}
	client := must(ParseCert(leaf.Cert))(t)
	if client.IsCA || len(client.ExtKeyUsage) != 1 || client.ExtKeyUsage[0] != x509.ExtKeyUsageClientAuth {
		t.Errorf("client: CA %v, usages %v", client.IsCA, client.ExtKeyUsage)
	}
	if err := verify(t, a, leaf.Cert, "", x509.ExtKeyUsageServerAuth, start); err == nil {
		t.Error("a client's certificate passes as a server's")
	}
}

func TestLeafEndsWithItsAuthority(t *testing.T) {
	a := newTestAuthority(t)
	late := a.Cert.NotAfter.Add(-time.Hour)
	leaf := must(ParseCert(must(a.Issue(Request{User: "x"}, late))(t).Cert))(t)
	if !leaf.NotAfter.Equal(a.Cert.NotAfter) {
		t.Errorf("ends %s, the authority %s", leaf.NotAfter, a.Cert.NotAfter)
	}
	if _, err := a.Issue(Request{User: "x"}, a.Cert.NotAfter.Add(time.Second)); err == nil || !strings.Contains(err.Error(), "has expired") {
		t.Errorf("issue by an expired authority: %v", err)
	}
}

func TestParseAuthority(t *testing.T) {
	a, b := newTestAuthority(t), newTestAuthority(t)
	again := must(ParseAuthority(a.CertPEM(), a.KeyPEM()))(t)
	if again.Fingerprint() != a.Fingerprint() || !bytes.Equal(again.KeyPEM(), a.KeyPEM()) || len(a.Fingerprint().String()) != 64 {
		t.Error("the authority that was written is not the one that is read")
	}
	if a.Fingerprint() == b.Fingerprint() {
		t.Error("two authorities have one fingerprint")
	}
	secret := strings.Split(string(a.KeyPEM()), "\n")[1]
	for _, tc := range []struct{ name, cert, key, want string }{
		{"another's key", string(b.CertPEM()), string(a.KeyPEM()), "does not belong"},
		{"no certificate", "", string(a.KeyPEM()), "certificate: no PEM block"},
		{"no key", string(a.CertPEM()), "", "private key: no PEM block"},
		{"exchanged", string(a.KeyPEM()), string(a.CertPEM()), "certificate: no PEM block"},
		{"half a key", string(a.CertPEM()), string(pem.EncodeToMemory(&pem.Block{Type: pemKey, Bytes: []byte(secret)})), "private key: damaged"},
		{"too long", string(a.CertPEM()), strings.Repeat(" ", maxPEM+1), "too many"},
	} {
		_, err := ParseAuthority([]byte(tc.cert), []byte(tc.key))
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: got %v, want %q", tc.name, err, tc.want)
		}
		if err != nil && strings.Contains(err.Error(), secret[:16]) {
			t.Errorf("%s: the error shows the key", tc.name)
		}
	}
}

// TestRequest signs for a key that never leaves its owner.
func TestRequest(t *testing.T) {
	a := newTestAuthority(t)
	request, key, err := NewRequest()
	if err != nil {
		t.Fatal(err)
	}
	user := PeerUser("west")
	pair := Pair{must(a.Sign(request, Request{User: user, Validity: time.Hour}, start))(t), key}
	if _, err := pair.TLS(); err != nil {
		t.Fatal(err)
	}
	cert := must(ParseCert(pair.Cert))(t)
	if cert.Subject.CommonName != user || cert.NotAfter.Sub(start) != time.Hour {
		t.Errorf("user %s until %s", cert.Subject.CommonName, cert.NotAfter)
	}
	if err := verify(t, a, pair.Cert, "", x509.ExtKeyUsageClientAuth, start); err != nil {
		t.Error(err)
	}
}

func TestRequestSaysNothingOfItsOwn(t *testing.T) {
	a := newTestAuthority(t)
	key := must(newKey())(t)
	der := must(x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "root"}, DNSNames: []string{"store.east"}, IPAddresses: []net.IP{{172, 29, 1, 2}},
	}, key))(t)
	cert := must(ParseCert(must(a.Sign(encode(pemRequest, der), Request{User: "peer-west-aaaaaaaa"}, start))(t)))(t)
	if cert.Subject.CommonName != "peer-west-aaaaaaaa" || len(cert.DNSNames) != 0 || len(cert.IPAddresses) != 0 || cert.IsCA {
		t.Errorf("%q for %v %v, CA %v", cert.Subject, cert.DNSNames, cert.IPAddresses, cert.IsCA)
	}
}

func TestBadRequestsAreRefused(t *testing.T) {
	a := newTestAuthority(t)
	good, _, err := NewRequest()
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(good)
	forged := bytes.Clone(block.Bytes)
	forged[len(forged)-1] ^= 1
	weak := must(x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, must(rsa.GenerateKey(rand.Reader, 2048))(t)))(t)
	ok := Request{User: "peer-west-aaaaaaaa"}
	for _, tc := range []struct {
		name    string
		request []byte
		r       Request
		want    string
	}{
		{"empty", nil, ok, "no PEM block"},
		{"no request", a.CertPEM(), ok, "no PEM block of type CERTIFICATE REQUEST"},
		{"damaged", encode(pemRequest, []byte("x")), ok, "request for a certificate: "},
		{"signature of another key", encode(pemRequest, forged), ok, "does not have the key"},
		{"RSA", encode(pemRequest, weak), ok, "want an ECDSA key on P-256"},
		{"too long", make([]byte, maxPEM+1), ok, "too many"},
		{"no user", good, Request{}, `user ""`},
		{"a user with a line break", good, Request{User: "a\nb"}, "letters, digits"},
		{"hosts of a client", good, Request{User: "a", Hosts: []string{"b"}}, "hosts are for servers"},
		{"a server without hosts", good, Request{User: "a", Server: true}, "no host"},
		{"a host with a space", good, Request{User: "a", Server: true, Hosts: []string{"a b"}}, "neither an address nor a name"},
		{"negative validity", good, Request{User: "a", Validity: -1}, "negative"},
	} {
		if _, err := a.Sign(tc.request, tc.r, start); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: got %v, want %q", tc.name, err, tc.want)
		}
	}
}

func TestDue(t *testing.T) {
	a := newTestAuthority(t)
	cert := must(ParseCert(must(a.Issue(Request{User: "x"}, start))(t).Cert))(t)
	for after, want := range map[time.Duration]bool{0: false, 59 * 24 * time.Hour: false, 61 * 24 * time.Hour: true, 100 * 24 * time.Hour: true} {
		if got := Due(cert, start.Add(after)); got != want {
			t.Errorf("after %s: due %v", after, got)
		}
	}
}

func TestPeerUser(t *testing.T) {
	for _, cluster := range []string{"west", "a", "us-west-2", "peer-x", strings.Repeat("a", 63)} {
		user := PeerUser(cluster)
		if got, ok := ClusterOf(user); !ok || got != cluster {
			t.Errorf("ClusterOf(%q) = %q, %v", user, got, ok)
		}
		if user == PeerUser(cluster) {
			t.Errorf("%q twice", user)
		}
		if err := (Request{User: user}).check(); err != nil {
			t.Error(err)
		}
	}
	for _, user := range []string{"", "agent", "root", "peer-", "peer-west", "peer--aaaaaaaa", "peer-west-aaaaaaa1", "peer-west-AAAAAAAA", "peer-west-aaaaaaaaa", "peer-West-aaaaaaaa", "peer-west-", "peer--west-aaaaaaaa", "xpeer-west-aaaaaaaa"} {
		if got, ok := ClusterOf(user); ok {
			t.Errorf("ClusterOf(%q) = %q", user, got)
		}
	}
}

func FuzzParse(f *testing.F) {
	a := newTestAuthority(f)
	request, key, err := NewRequest()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(a.CertPEM(), a.KeyPEM())
	f.Add(request, key)
	block, _ := pem.Decode(a.CertPEM())
	requestBlock, _ := pem.Decode(request)
	f.Add(block.Bytes, requestBlock.Bytes)
	f.Fuzz(func(t *testing.T, x, y []byte) {
		for _, text := range [][]byte{x, encode(pemCert, x), encode(pemRequest, x)} {
			if cert, err := ParseCert(text); err == nil {
				FingerprintOf(cert)
				Due(cert, start)
			}
			if cert, err := a.Sign(text, Request{User: "peer-west-aaaaaaaa"}, start); err == nil {
				if signed, err := ParseCert(cert); err != nil || signed.Subject.CommonName != "peer-west-aaaaaaaa" || signed.IsCA {
					t.Errorf("signed %v, %v", signed, err)
				}
			}
			for _, key := range [][]byte{y, encode(pemKey, y)} {
				if parsed, err := ParseAuthority(text, key); err == nil {
					parsed.KeyPEM()
				}
			}
		}
	})
}
