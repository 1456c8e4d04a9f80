package peering

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"causeway/identity/pki"
	"causeway/kvstore"
)

// handlers feeds requests to the API as they come off the wire, without a network: nothing is reached from here.
type handlers struct {
	*cluster
	server *server
	secret []byte // of a token that works, with the ID tokenID
	peer   Peer   // connected
}

const tokenID = "aaaaaaaaaaaaa"

func newHandlers(f *testing.F) *handlers {
	c := bareCluster(f, "west", 2)
	c.authority = mustGet[*pki.Authority](f)(pki.NewAuthority("west", time.Now()))
	store := kvstore.NewMemory()
	f.Cleanup(func() { store.Close() })
	c.Store, c.endpoint = store, "192.0.2.1:7958"
	c.StoreEndpoints = []string{"https://192.0.2.1:2379"}
	c.Log = slog.New(slog.DiscardHandler)
	c.Administer = func(context.Context, *pki.Authority) (Administrator, error) { return (*memoryAccess)(c), nil }
	c.dialer = func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("there is no network") }
	c.trust.authority = c.authority
	must(f, StoreAuthority(f.Context(), store, c.authority))
	h := &handlers{cluster: c, server: &server{Service: c.Service}, secret: make([]byte, secretSize)}
	h.peer = samplePeer(f)
	h.peer.Cluster, h.peer.User = sampleInfo("north", 3), "peer-north-aaaaaaaa"
	return h
}

// reset brings the store back to how every request finds it.
func (h *handlers) reset() {
	ctx := context.Background()
	for _, prefix := range []string{tokensPrefix, PeersPrefix} {
		entries, err := h.Store.List(ctx, prefix)
		must(h.t, err)
		for _, e := range entries {
			must(h.t, h.Store.Delete(ctx, e.Key))
		}
	}
	sum := sha256.Sum256(h.secret)
	record := TokenRecord{ID: tokenID, Expires: time.Now().Add(time.Hour), Secret: sum[:]}
	must(h.t, h.Store.Put(ctx, tokenKey(tokenID), encodeTokenRecord(record)))
	must(h.t, h.Store.Put(ctx, PeerKey("north"), EncodePeer(h.peer)))
	h.users = map[string]string{h.peer.User: kvstore.Prefix}
	h.attempts = attempts{}
}

// contents of the store and its users, to see that nothing was written.
func (h *handlers) contents() (all []string) {
	entries, err := h.Store.List(context.Background(), "")
	must(h.t, err)
	for _, e := range entries {
		all = append(all, e.Key+" "+string(e.Value))
	}
	return append(all, strings.Join(h.readers(), ","))
}

// as makes the context of a request from who has a certificate for a user; from a stranger if that is empty.
func (h *handlers) as(user string) context.Context {
	info := credentials.TLSInfo{}
	if user != "" {
		cert := &x509.Certificate{}
		cert.Subject.CommonName = user
		info.State = tls.ConnectionState{VerifiedChains: [][]*x509.Certificate{{cert}}}
	}
	return peer.NewContext(context.Background(), &peer.Peer{Addr: &net.TCPAddr{IP: net.IPv4(192, 0, 2, 9), Port: 1}, AuthInfo: info})
}

// call has a method decode and handle a request.
func (h *handlers) call(ctx context.Context, method int, request []byte) error {
	decode := func(m any) error {
		if err := proto.Unmarshal(request, m.(proto.Message)); err != nil {
			return status.Error(codes.Internal, "it cannot be read") // as gRPC does
		}
		return nil
	}
	methods := Peering_ServiceDesc.Methods
	if method < len(methods) {
		_, err := methods[method].Handler(h.server, ctx, decode, nil)
		return err
	}
	return Peering_ServiceDesc.Streams[0].Handler(h.server, &fakeStream{ctx: ctx, request: decode})
}

type fakeStream struct {
	grpc.ServerStream
	ctx     context.Context
	request func(any) error
}

func (s *fakeStream) Context() context.Context { return s.ctx }
func (s *fakeStream) SendMsg(any) error        { return nil }
func (s *fakeStream) RecvMsg(m any) error {
	if s.request == nil {
		return io.EOF
	}
	defer func() { s.request = nil }()
	return s.request(m)
}

// FuzzRequests feeds bytes to every method, from a stranger, from a peer and from one that is none any more. Nothing panics, no answer is without a
// kind that clients know, and nothing is written but by who may.
func FuzzRequests(f *testing.F) {
	h := newHandlers(f)
	methods := len(Peering_ServiceDesc.Methods) + len(Peering_ServiceDesc.Streams)
	joiner := sampleSide("east", 1)
	joiner.pem = mustGet[*pki.Authority](f)(pki.NewAuthority("east", time.Now())).CertPEM()
	joiner.store, joiner.endpoints = []string{"https://192.0.2.2:2379"}, []string{"192.0.2.2:7958"}
	joiner.peers = []known{sampleKnown("south", 4, Left)}
	request, _, err := pki.NewRequest()
	must(f, err)
	for _, secret := range [][]byte{h.secret, make([]byte, 3)} {
		token := &Credential{Id: tokenID, Secret: secret}
		for i := range methods {
			for _, m := range []proto.Message{
				&LookRequest{Token: token, Joiner: joiner.message(), Probe: true},
				&JoinRequest{Token: token, Joiner: joiner.message(), Certificate: joiner.pem, Request: request},
				&VerifyRequest{Wait: true, Timeout: 1}, &RenewRequest{Request: request}, &LeaveRequest{Undo: true}, &IntroduceRequest{To: "north"}, &InviteRequest{Cluster: "south"},
			} {
				f.Add(i, i%3, mustGet[[]byte](f)(proto.Marshal(m)))
			}
		}
	}
	f.Fuzz(func(t *testing.T, method, from int, request []byte) {
		if method < 0 || method >= methods || from < 0 || from > 2 {
			return
		}
		h.t = t
		h.reset()
		before := h.contents()
		user := []string{"", h.peer.User, "peer-north-bbbbbbbb"}[from]
		err := h.call(h.as(user), method, request)
		if code := status.Code(err); err != nil && code == codes.Unknown {
			t.Errorf("the answer is of no kind: %v", err)
		}
		// The joiner's authority is needed to sign for the pending key, so here not even the token writes anything.
		if after := h.contents(); user != h.peer.User && !slices.Equal(before, after) {
			t.Errorf("method %d as %q has changed\n%s\nto\n%s", method, user, strings.Join(before, "\n"), strings.Join(after, "\n"))
		}
	})
}

// FuzzAnswers feeds bytes to what a joiner reads of an issuer that it does not trust yet.
func FuzzAnswers(f *testing.F) {
	issuer := sampleSide("west", 2, sampleKnown("south", 4, Connected))
	issuer.pem = mustGet[*pki.Authority](f)(pki.NewAuthority("west", time.Now())).CertPEM()
	issuer.store, issuer.endpoints = []string{"192.0.2.2:2379"}, []string{"192.0.2.2:7958"}
	f.Add(mustGet[[]byte](f)(proto.Marshal(&LookResponse{Issuer: issuer.message(), Conflicts: []string{"x"}, Probes: []*CheckResult{checkMessage(Check{Name: CheckTCP, Outcome: OK})}})))
	f.Add(mustGet[[]byte](f)(proto.Marshal(&JoinResponse{Certificate: issuer.pem, Keys: [][]byte{make([]byte, 32)}})))
	own := sampleSide("east", 1)
	east := bareCluster(f, "east", 1)
	f.Fuzz(func(t *testing.T, answer []byte) {
		look, join := &LookResponse{}, &JoinResponse{}
		c := &connect{s: east.Service, token: Token{Cluster: "west"}, own: own, issuer: issuer, report: func(Event) {}}
		if proto.Unmarshal(answer, look) == nil {
			if side, err := parseSide(look.GetIssuer()); err == nil {
				conflicts(own, side)
				conflicts(side, own)
				c.token.Cluster, c.token.Authority = side.info.Name, side.authority
				if _, err := c.readIssuer(look); err != nil && side.protocol == Protocol {
					t.Errorf("a side that can be read is refused: %v", err)
				}
			}
			_ = c.reportProbes(look)
		}
		if proto.Unmarshal(answer, join) == nil {
			if err := c.trust(join, nil, "peer-west-aaaaaaaa"); err == nil {
				t.Error("a certificate without its key is accepted")
			}
		}
	})
}
